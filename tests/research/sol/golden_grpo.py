"""Writes golden_grpo.json: GRPO worked out in NumPy loops, formula by formula.

Independent of `research`: run it again with
`python tests/research/sol/golden_grpo.py` after a change of a formula.
"""

import json
import math
import pathlib

import numpy as np

B, K, T, A, C = 2, 4, 3, 5, 3
GAMMA = 0.85
TOLERANCE = 0.02
WEIGHTS = [100.0, 100.0, 200.0]
CLIP_LOW, CLIP_HIGH, ENTROPY, KL, DUAL = 0.2, 0.28, 0.05, 0.04, 3.0
EPSILON = 1e-6


def returns_to_go(rewards):
  out = np.zeros((B, K, T))
  for b in range(B):
    for k in range(K):
      for t in range(T):
        for s in range(t, T):
          out[b, k, t] += GAMMA ** (s - t) * rewards[b, k, s]
  return out


def penalties(spent, targets, mask):
  out = np.zeros((B, K))
  for b in range(B):
    for k in range(K):
      for axis in range(3):
        values = [spent[b, k, t, axis] for t in range(T) if mask[b, k, t]]
        gap = abs(sum(values) / len(values) - targets[b, axis])
        if gap > TOLERANCE:
          out[b, k] += WEIGHTS[axis] * (gap - TOLERANCE) ** 2
  return out


def relative(returns, level, normalise, mask):
  out = np.zeros((B, K, T))
  for b in range(B):
    for t in range(T):
      if level == "process":
        members = [k for k in range(K) if mask[b, k, t]]
      else:
        members = [k for k in range(K) if any(mask[b, k])]
      at = t if level == "process" else 0
      for k in range(K):
        if not mask[b, k, t]:
          continue
        group = [returns[b, j, at] for j in members]
        mean = sum(group) / len(group)
        value = returns[b, k, at] - mean
        if normalise == "zscore":
          variance = sum((x - mean) ** 2 for x in group) / (len(group) - 1)
          value = value / (math.sqrt(variance) + EPSILON)
        if normalise == "leave_one_out":
          others = [returns[b, j, at] for j in members if j != k]
          value = returns[b, k, at] - sum(others) / len(others)
        out[b, k, t] = value
  return out


def whiten(values, mask):
  flat = [values[i] for i in np.ndindex(B, K, T) if mask[i]]
  mean = sum(flat) / len(flat)
  deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat))
  out = np.zeros((B, K, T))
  for i in np.ndindex(B, K, T):
    if mask[i]:
      out[i] = (values[i] - mean) / (deviation + EPSILON)
  return out


def log_softmax(row):
  largest = max(row)
  total = sum(math.exp(x - largest) for x in row)
  return [x - largest - math.log(total) for x in row]


def loss(logits, actions, old_logp, ref_logp, advantages, mask, dual):
  total = entropy = kl = kl_ref = clipped = nonzero = 0.0
  ratios, logps = [], []
  for i in np.ndindex(B, K, T):
    if not mask[i]:
      continue
    log_p = log_softmax(list(logits[i]))
    logp = log_p[actions[i]]
    difference = min(max(logp - old_logp[i], -20.0), 20.0)
    ratio = math.exp(difference)
    advantage = advantages[i]
    inside = min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
    objective = min(ratio * advantage, inside * advantage)
    clipped += inside * advantage < ratio * advantage
    if dual and advantage < 0:
      objective = max(objective, DUAL * advantage)
    spread = -sum(math.exp(x) * x for x in log_p)
    d = ref_logp[i] - logp
    k3 = math.exp(d) - d - 1
    total += -objective - ENTROPY * spread + KL * k3
    entropy += spread
    kl += ratio - difference - 1
    kl_ref += k3
    nonzero += abs(advantage) > EPSILON
    ratios.append(ratio)
    logps.append(logp)
  count = len(ratios)
  return {
    "sum": total,
    "denominator": count,
    "diagnostics": {
      "advantage_nonzero": nonzero / count,
      "ratio_min": min(ratios),
      "ratio_max": max(ratios),
      "ratio_mean": sum(ratios) / count,
      "clip_share": clipped / count,
      "entropy": entropy / count,
      "kl": kl / count,
      "kl_reference": kl_ref / count,
      "logp_min": min(logps),
      "logp_max": max(logps),
    },
  }


def main():
  rng = np.random.default_rng(0)
  rewards = rng.normal(-3, 1, (B, K, T))
  spent = rng.uniform(0.1, 1, (B, K, T, 3))
  targets = rng.uniform(0.3, 0.8, (B, 3))
  mask = np.ones((B, K, T), int)
  mask[0, 1, 2] = mask[1, 3, 1] = mask[1, 3, 2] = 0
  streams = rng.normal(0, [[[[1]]], [[[10]]], [[[0.1]]]], (C, B, K, T))
  stream_weights = [1.0, 0.5, 2.0]
  logits = rng.normal(0, 1, (B, K, T, A))
  actions = rng.integers(0, A, (B, K, T))
  old_logp, ref_logp = np.zeros((2, B, K, T))
  for i in np.ndindex(B, K, T):
    old = log_softmax(list(logits[i] + rng.normal(0, 0.5, A)))
    reference = log_softmax(list(logits[i] + rng.normal(0, 0.5, A)))
    old_logp[i], ref_logp[i] = old[actions[i]], reference[actions[i]]

  masked_rewards = rewards * mask
  returns = returns_to_go(masked_rewards)
  penalty = penalties(spent, targets, mask)
  score = returns - penalty[:, :, None]
  advantages = {}
  for level in ("process", "outcome"):
    for normalise in ("center", "zscore", "leave_one_out"):
      plain = relative(score, level, normalise, mask)
      advantages[f"{level} {normalise}"] = plain
      advantages[f"{level} {normalise} whiten"] = whiten(plain, mask)
  summed = np.zeros((B, K, T))
  for stream, weight in zip(streams, stream_weights):
    summed += weight * relative(stream, "process", "zscore", mask)
  chosen = advantages["process center whiten"]
  # Where the advantage is lowest, the old policy found its action impossible.
  old_logp[np.unravel_index(np.argmin(chosen), chosen.shape)] = -40.0
  inputs = {
    "rewards": rewards,
    "spent": spent,
    "targets": targets,
    "mask": mask,
    "streams": streams,
    "stream_weights": stream_weights,
    "logits": logits,
    "actions": actions,
    "old_logp": old_logp,
    "ref_logp": ref_logp,
  }
  expected = {
    "returns": returns,
    "penalty": penalty,
    "score": score,
    "advantages": advantages,
    "gdpo": whiten(summed, mask),
  }
  arguments = (logits, actions, old_logp, ref_logp, chosen, mask)
  losses = {
    "plain": loss(*arguments, dual=False),
    "dual": loss(*arguments, dual=True),
  }
  golden = {"inputs": inputs, "expected": expected, "losses": losses}
  path = pathlib.Path(__file__).with_suffix(".json")
  text = json.dumps(golden, default=np.ndarray.tolist)
  path.write_text(text + "\n")


if __name__ == "__main__":
  main()
