"""Problems of KernelBench, which a split must not cut."""

from research.predictors import kernelbench


def test_renamed_and_repeated_problems_are_one():
  codes = {
    name: f"def get_inputs():\n  return [torch.rand({size}, 4)]"
    for name, size in (("a", 2), ("b", 3), ("c", 4), ("d", 2), ("e", 5))
  }
  names = {
    "36_LTSMHn.py": ("level3", "a"),
    "36_LSTMHn.py": ("level3", "b"),
    "39_Gemm.py": ("level2", "d"),
    "1_gpt2_bs1_seq2.py": ("level4", "c"),
    "20_gpt2_bs8_seq9.py": ("level4", "e"),
    "1_other.py": ("level3", "c"),
    "50_conv_standard_2D__square_input__square_kernel.py": ("level1", "b"),
    "63_conv_standard_2D__square_input__square_kernel.py": ("level1", "e"),
  }
  rows = [
    {"name": name, "level": level, "src": src}
    for name, (level, src) in names.items()
  ]
  found = kernelbench.problems(rows, codes)
  # One program in two problems, a table, sizes, and a number say so.
  same = [
    ("level3/36_LTSMHn.py", "level3/36_LSTMHn.py"),
    ("level2/39_Gemm.py", "level3/36_LTSMHn.py"),
    ("level4/1_gpt2_bs1_seq2.py", "level4/20_gpt2_bs8_seq9.py"),
    tuple(f"level1/{n}_conv_standard_2D__square_input__square_kernel.py"
          for n in (50, 63)),
  ]  # fmt: skip
  assert all(found[a] == found[b] for a, b in same)
  alone = kernelbench.problems([rows[0], rows[3], rows[6]], codes)
  assert alone == {name: name for name in alone} and len(alone) == 3
