"""Writes `sentencepiece.npz`: small models of SentencePiece, and ids by it.

Needs the package, which nothing else here does:

  python3 -m venv golden_env
  golden_env/bin/pip install sentencepiece==0.2.3 numpy
  golden_env/bin/python tests/models/golden/generate_sentencepiece.py

The file holds `texts` (in UTF-8, parted by zeros), and for each of `names` the
`.model` file as bytes under `NAME.model`, the ids of all texts in a row under
`NAME.ids`, and how many each has under `NAME.lengths`. Rules of normalisation
are a few of its own: those of the package take a quarter of a megabyte.
"""

import io
import itertools
import lzma
import pathlib
import random
import tempfile

import numpy as np
import sentencepiece

_CORPUS = "data/corpora/wikitext2_valid.txt.xz"
_OPTIONS = {
  "plain": {},
  "bytes": {"byte_fallback": True, "split_digits": True},
  "spaces": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
  "marks": {
    "user_defined_symbols": ["<sep>", "<sepx>", "12"],
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": -1,
    "eos_id": -1,
  },
  # Sources and results in hexadecimal: A to a, the ligature fi to f i, é to e,
  # tab and newline to space.
  "rules": {
    "rules": "41\t61\nFB01\t66 69\nE9\t65\n9\t20\nA\t20\n",
    "byte_fallback": True,
  },
}
_TEXTS = [
  "",
  "   ",
  "  two  spaces ",
  "tab\tand\nnewline",
  "<s> control </s> <unk>",
  "naïve café: 漢字 ① ﬁne",
  "lr=0.001 depth=12",
  "A\u2581b\u2581",
  '{\n  "x": 1\n}',
  "<sep>a<sep><sep> b <sepx>",
  "banana bandana ananas",
]


def _train(kind: str, sentences: list[str], options: dict) -> bytes:
  """A model of `kind`, "unigram" or "bpe"."""
  options, model = dict(options), io.BytesIO()
  with tempfile.TemporaryDirectory() as folder:
    rules = pathlib.Path(folder, "rules.tsv")
    rules.write_text(options.pop("rules", ""))
    if rules.stat().st_size:
      options["normalization_rule_tsv"] = str(rules)
    else:
      options["normalization_rule_name"] = "identity"
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sentences),
      model_writer=model,
      model_type=kind,
      vocab_size=400,
      minloglevel=2,
      **options,
    )
  return model.getvalue()


def main() -> None:
  """Writes the golden file beside this script."""
  folder = pathlib.Path(__file__).parent
  with lzma.open(folder.parents[2] / _CORPUS, "rt", encoding="utf-8") as file:
    lines = [line.strip() for line in file if line.strip()]
  # Few characters, so that the models know all and yet are small.
  sentences = [line for line in lines if line.isascii()][:1200]
  draw = random.Random(0)
  texts = _TEXTS + lines[-20:]
  texts += [
    "".join(draw.choice(" abcdeéz129<>s/\u2581\n😀") for _ in range(30))
    for _ in range(60)
  ]
  names = [f"{k}_{n}" for k in ("unigram", "bpe") for n in _OPTIONS]
  joined = "\0".join(texts).encode()
  arrays = {
    "names": np.array(names),
    "texts": np.frombuffer(joined, np.uint8),
  }
  for name in names:
    kind, option = name.split("_")
    model = _train(kind, sentences, _OPTIONS[option])
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [processor.EncodeAsIds(text) for text in texts]
    arrays[f"{name}.model"] = np.frombuffer(model, np.uint8)
    arrays[f"{name}.ids"] = np.array(list(itertools.chain(*ids)), np.int16)
    arrays[f"{name}.lengths"] = np.array([len(row) for row in ids], np.int16)
  np.savez_compressed(folder / "sentencepiece.npz", **arrays)


if __name__ == "__main__":
  main()
