"""Made-up programs of PyTorch with the time that a roofline gives them.

A second task beside few measured programs: texts in the canonical form of
`program_text`, one operation or a short chain, sizes at random. Their time is
the longer of arithmetic and memory traffic for each operation, plus a launch,
on a device that does not exist. It teaches what sizes are worth; nothing of it
was measured.
"""

import dataclasses
import math

import numpy as np

HEADING = "no device\nroofline\nestimate\n"
# Operations and bytes a second, and seconds of a launch.
_FLOPS, _BYTES, _LAUNCH = 3e13, 1.5e12, 5e-6
_ITEM = 4
_CHANNELS = (1, 3, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
_SIZES = (8, 10, 16, 20, 24, 32, 48, 64, 96, 100, 128, 224, 256, 512, 1024)
_ROWS = (1, 2, 4, 8, 10, 16, 32, 64, 100, 128, 256, 512, 1024, 2048, 4096)
_LARGEST, _SMALLEST = 1 << 30, 1 << 10
_POINTWISE = (
  "torch.relu(x)",
  "torch.sigmoid(x)",
  "torch.tanh(x)",
  "F.gelu(x)",
  "F.softplus(x)",
  "F.leaky_relu(x, negative_slope=0.01)",
  "F.hardswish(x)",
  "x * torch.sigmoid(x)",
  "torch.clamp(x, min=-1, max=1)",
  "x * 2.0",
  "torch.softmax(x, dim=1)",
)
_REDUCTIONS = ("sum", "mean", "amax", "argmax", "logsumexp")


@dataclasses.dataclass
class _Program:
  """Lines of a program, its seconds, and the shape of `x` so far."""

  shape: tuple[int, ...]
  layers: list[str] = dataclasses.field(default_factory=list)
  lines: list[str] = dataclasses.field(default_factory=list)
  seconds: float = 0.0

  def spend(self, flops: float, elements: float) -> None:
    """Counts one operation."""
    self.seconds += _LAUNCH + max(flops / _FLOPS, _ITEM * elements / _BYTES)


def programs(count: int, seed: int) -> list[tuple[str, float]]:
  """Texts without heading, and milliseconds."""
  rng = np.random.default_rng((seed, 47))
  found = []
  while len(found) < count:
    made = _one(rng)
    if made is not None:
      found.append(made)
  return found


def _one(rng: np.random.Generator) -> tuple[str, float] | None:
  """A program, or None where its sizes do not do."""
  kind = rng.choice(
    ["conv", "matmul", "linear", "plain"], p=[0.4, 0.2, 0.2, 0.2]
  )
  pick = lambda values: int(rng.choice(values))
  if kind == "matmul":
    m, k, n = (pick(_ROWS) * pick((1, 1, 4)) for _ in range(3))
    if not _SMALLEST < max(m * k, k * n, m * n) < _LARGEST:
      return None
    seconds = max(
      2.0 * m * k * n / _FLOPS, _ITEM * (m * k + k * n + m * n) / _BYTES
    )
    text = (
      f"inputs {_power(m * k)} {_power(k * n)}\nA = torch.rand({m}, {k})\n"
      f"B = torch.rand({k}, {n})\nreturn [A, B]\nModel\nforward A B\n"
      "return torch.matmul(A, B)"
    )
    return text, 1e3 * (seconds + _LAUNCH)
  if kind == "linear":
    shape = pick(_ROWS), pick(_ROWS) * pick((1, 1, 4))
  else:
    axes = pick((1, 2, 2, 2, 3))
    sizes = [pick(_SIZES)] * axes if rng.random() < 0.6 else [
      pick(_SIZES) for _ in range(axes)
    ]  # fmt: skip
    shape = (pick(_ROWS[:10]), pick(_CHANNELS), *sizes)
  program = _Program(shape)
  if kind == "conv":
    _convolve(program, rng, pick)
  elif kind == "linear":
    wide = pick(_ROWS)
    rows, narrow = shape
    program.layers.append(f"self.linear = nn.Linear({narrow}, {wide})")
    program.lines.append("x = self.linear(x)")
    program.spend(
      2.0 * rows * narrow * wide, rows * (narrow + wide) + narrow * wide
    )
    program.shape = rows, wide
  for _ in range(pick((0, 0, 1, 2, 3)) + (kind == "plain")):
    _follow(program, rng, pick)
  largest = max(math.prod(shape), math.prod(program.shape))
  if not _SMALLEST < largest < _LARGEST:
    return None
  made = f"x = torch.rand({', '.join(map(str, shape))})"
  lines = [f"inputs {_power(math.prod(shape))}", made, "return [x]", "Model"]
  lines += [*program.layers, "forward x", *program.lines, "return x"]
  return "\n".join(lines), 1e3 * program.seconds


def _power(elements: int) -> str:
  return f"2^{round(math.log2(elements))}"


def _convolve(program: _Program, rng, pick) -> None:
  batch, channels, *sizes = program.shape
  axes, kernel = len(sizes), min(pick((1, 3, 3, 3, 5, 7)), *sizes)
  stride, padding = pick((1, 1, 2)), pick((0, 0, 1, 2))
  transposed = rng.random() < 0.3
  wide, groups = pick(_CHANNELS), 1
  if rng.random() < 0.15:
    wide = groups = channels
  if transposed:
    out = [(n - 1) * stride - 2 * padding + kernel for n in sizes]
  else:
    out = [(n + 2 * padding - kernel) // stride + 1 for n in sizes]
  out = [max(n, 1) for n in out]
  name = f"Conv{'Transpose' if transposed else ''}{axes}d"
  more = f", groups={groups}" if groups > 1 else ""
  program.layers.append(
    f"self.conv = nn.{name}({channels}, {wide}, {kernel}, stride={stride}, "
    f"padding={padding}{more})"
  )
  program.lines.append("x = self.conv(x)")
  weights = channels * wide // groups * kernel**axes
  places = math.prod(sizes if transposed else out)
  read = batch * (channels * math.prod(sizes) + wide * math.prod(out))
  program.spend(2.0 * batch * places * weights, read + weights)
  program.shape = (batch, wide, *out)


def _follow(program: _Program, rng, pick) -> None:
  """One more operation on `x`."""
  elements, axes = math.prod(program.shape), len(program.shape) - 2
  kind = rng.random()
  if kind < 0.15 and axes > 0 and min(program.shape[2:]) >= 4:
    size = pick((2, 2, 3, 4))
    name = str(rng.choice(["MaxPool", "AvgPool"]))
    program.layers.append(f"self.pool = nn.{name}{axes}d({size})")
    program.lines.append("x = self.pool(x)")
    out = [n // size for n in program.shape[2:]]
    program.shape = (*program.shape[:2], *out)
    program.spend(0.0, elements + math.prod(program.shape))
  elif kind < 0.3 and axes > 0:
    program.layers.append(f"self.bn = nn.BatchNorm{axes}d({program.shape[1]})")
    program.lines.append("x = self.bn(x)")
    program.spend(0.0, 3 * elements)
  elif kind < 0.4:
    program.lines.append(
      f"x = torch.{rng.choice(_REDUCTIONS)}(x, dim=1, keepdim=True)"
    )
    program.shape = (program.shape[0], 1, *program.shape[2:])
    program.spend(0.0, elements)
  else:
    program.lines.append(f"x = {rng.choice(_POINTWISE)}")
    program.spend(0.0, 2 * elements)
