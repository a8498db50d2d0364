"""Errors of formats, tails of distributions, and recipes by formats' names."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import InputError
from ops.quantized import FORMATS, QTensor, formats, quantize
from research.quantization import apply, format_errors, gptq, tails_picture
from research.quantization.recipes import BY_FORMAT
from research.results import formats as tables


def test_every_signed_format_of_few_bits_is_a_recipe():
  few = {name for name in formats.SIGNED if FORMATS[name].bits <= 4}
  own = {"razer4_inputs", "nvfp4_token", "razer4_token"}
  assert few == {*BY_FORMAT, *own}
  for name, recipe in BY_FORMAT.items():
    assert recipe.text.startswith(f"{FORMATS[name].bits}-bit weights")
    assert recipe.kernels == recipe.head == name


@pytest.mark.parametrize("name", ["bitmod3", "nvfp4"])
def test_a_model_takes_a_format_by_name(name, mamba2):
  config, params = mamba2
  _, found = apply.quantize(config, params, BY_FORMAT[name], None)
  kernel = found["layers"][0]["mixer"]["in_proj"]["kernel"]
  assert isinstance(kernel, QTensor) and kernel.format.name == name
  kernel.check()
  assert kernel.format.group <= FORMATS[name].group


def test_decibels_and_bits_are_those_of_the_arrays():
  # Levels of a format are kept as they are.
  x = jnp.asarray([[-7.0, 3.0, 0.0, 1.0] * 32])
  wide = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 256)))
  arrays = {"levels": x, "stack": wide.astype(jnp.float32)}
  found = list(format_errors.rows(arrays, ["int4", "sf3"]))
  by = {(row["data"], row["method"]): row for row in found}
  assert by["levels", "int4"]["value"] > 100
  assert by["levels", "int4"]["bits"] == 4.25
  q = quantize(wide[1].astype(jnp.float32), "sf3")
  assert by["stack", "sf3"]["bits"] == 8 * q.nbytes / q.size
  assert 10 < by["stack", "sf3"]["value"] < 14
  lines = tables.table(found).splitlines()
  assert len(lines) == 4 and lines[2].split()[1] == "int4"


@pytest.mark.parametrize("nu", [3, 6, 100])
def test_degrees_of_freedom_are_found(nu):
  rng = np.random.default_rng(nu)
  draw = rng.normal(size=8192) if nu == 100 else rng.standard_t(nu, 8192)
  found = format_errors.fit_tails(0.02 * draw)
  assert found["nu"] == pytest.approx(nu, rel=0.2) or found["nu"] > 40 < nu
  assert found["ks_t"] < 0.02
  assert (found["ks_normal"] > 0.03) == (nu < 10)
  rows = list(format_errors.tails({"a": jnp.asarray(draw)}))
  assert {row["metric"] for row in rows} == {"nu", "ks_t", "ks_normal"}
  assert len(tables.tails(rows).splitlines()) == 3


def test_tails_of_layers_are_told_apart_and_drawn(monkeypatch, tmp_path):
  rng = np.random.default_rng(0)
  layers = [rng.standard_t(3, (64, 64)), rng.normal(size=(64, 64))]
  arrays = {"layers.0.mlp.up_proj.kernel": jnp.asarray(np.stack(layers))}
  rows = list(format_errors.tails(arrays))
  heavy, normal = (row["value"] for row in rows if row["metric"] == "nu")
  assert 2 < heavy < 5 and normal > 20
  assert [row["layer"] for row in rows] == [0] * 3 + [1] * 3
  line = tables.tails(rows).splitlines()[2]
  assert f"[{heavy:.3f}, {normal:.3f}]" in line
  drawn = []
  monkeypatch.setattr(
    tails_picture.plots, "draw", lambda axis, s, number: drawn.append(s)
  )
  monkeypatch.setattr(tails_picture.plots, "save", lambda figure, path: None)
  monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda *a, **k: None)
  tails_picture.plot(tmp_path / "a.png", rows, "Kernels")
  nu, farther = drawn
  assert nu.name == "up_proj" and nu.x == [0, 1] and nu.y == [heavy, normal]
  assert farther.y[0] > 2 > farther.y[1]
  one = [row | {"layer": None} for row in rows]
  with pytest.raises(InputError, match="no kernel is of several layers"):
    tails_picture.plot(tmp_path / "a.png", one, "Kernels")


def test_kernels_lie_along_what_products_sum_over(mamba2):
  config, params = mamba2
  found = format_errors.kernels(params)
  assert all(name.endswith(".kernel") for name in found)
  assert any(x.shape[-1] == config.d_model for x in found.values())


def test_gptq_refuses_zero_points():
  with pytest.raises(ValueError, match="only symmetric formats"):
    gptq.gptq(jnp.ones((16, 4)), jnp.eye(16), FORMATS["int4_asym"])
