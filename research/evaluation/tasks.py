"""Tasks that language models are judged by, as lm-evaluation-harness asks them.

A task is a list of items: a context and one or several continuations. Prompts,
few-shot forms and answer patterns are those of lm-evaluation-harness 0.4
(lambada_openai, arc_easy, arc_challenge, hellaswag, winogrande, piqa, boolq,
mmlu, gsm8k), with two differences: few-shot examples are the first ones of
their pool, for every task, and `acc_norm` divides by the bytes of an answer,
which differs from its characters only outside of ASCII.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from models.errors import InputError
from research.evaluation import task_data

PERPLEXITY = "perplexity"
CHOICE, CLOZE, GENERATION = "choice", "cloze", "generation"
_LETTERS = "ABCD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """One question.

  Attributes:
    context: what the model reads, few-shot examples included.
    choices: continuations, the space before them included; of a generation
      task the one reference answer.
    answer: index of the right choice.
    contexts: where they are what differs, one a choice in the place of
      `context`; the continuations are the same.
  """

  context: str
  choices: tuple[str, ...]
  answer: int = 0
  contexts: tuple[str, ...] = ()

  @property
  def pairs(self) -> list[tuple[str, str]]:
    """Context and continuation of each choice."""
    contexts = self.contexts or [self.context] * len(self.choices)
    return list(zip(contexts, self.choices, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A list of items and how they are judged.

  Attributes:
    name: as users give it.
    kind: `CHOICE`: the likeliest continuation is the answer (acc, and acc_norm
      where the continuations differ); `CLOZE`: the continuation's likelihood
      (acc, perplexity); `GENERATION`: greedy text (exact_match, strict and
      flexible).
    data: file the items come from, and what was changed.
    shots: examples in the context.
    items: the questions.
    stop: strings that end a generation.
    max_tokens: of a generation.
  """

  name: str
  kind: str
  data: str
  shots: int
  items: tuple[Item, ...]
  stop: tuple[str, ...] = ()
  max_tokens: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """A text whose perplexity is asked for.

  Attributes:
    data: its name.
    text: all of it.
    window: tokens of a window; each begins with the begin token if the model
      has one.
    overlap: tokens that a window repeats from the one before as context.
    max_windows: so many windows, at even distances; None for all.
  """

  data: str
  text: str
  window: int
  overlap: int = 0
  max_windows: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Question:
  """A question before few-shot examples stand in front of it."""

  text: str
  choices: tuple[str, ...]
  answer: int = 0
  group: str = ""
  texts: tuple[str, ...] = ()

  @property
  def solved(self) -> str:
    text = self.texts[self.answer] if self.texts else self.text
    return f"{text}{self.choices[self.answer]}\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Form:
  """How a task's records become questions.

  Attributes:
    kind: of the task.
    files: names, without endings, under which its test records may lie.
    pool: the same for records that few-shot examples come from; () for none.
    parse: record -> question, or None where the record has another form.
    shots: examples unless the user says otherwise.
    heading: stands before all examples; {group} is the question's group.
  """

  kind: str
  files: tuple[str, ...]
  pool: tuple[str, ...]
  parse: Callable[[Mapping], _Question | None]
  shots: int = 0
  heading: str = ""


def load_task(
  name: str,
  folder: str | pathlib.Path | None,
  *,
  shots: int | None = None,
  limit: int | None = None,
) -> Task:
  """Reads a task from local files.

  Args:
    name: one of `NAMES`.
    folder: where its files lie; see `task_data.read_records` for their forms.
    shots: examples before a question; None for the task's own number.
    limit: so many items, at even distances over the file; None for all.

  Raises:
    InputError: the task is unknown, there is no folder, or its files are
      missing or malformed.
  """
  if name not in _FORMS:
    raise InputError(
      f"--tasks={name}: no such task; give perplexity, {', '.join(NAMES)}"
    )
  if folder is None:
    raise InputError(f"--tasks={name} needs --data, the folder of its files")
  form = _FORMS[name]
  shots = form.shots if shots is None else shots
  if shots and not form.pool:
    raise InputError(
      f"--shots={shots}: {name} has no examples to show: give --shots=0"
    )
  path, questions = _questions(name, form, form.files, folder)
  if limit is not None and limit < len(questions):
    taken = np.arange(limit) * len(questions) // limit
    questions = [questions[i] for i in taken]
  pools: dict[str, list[_Question]] = {}
  if shots:
    for example in _questions(name, form, form.pool, folder)[1]:
      pools.setdefault(example.group, []).append(example)
  items = tuple(_item(form, q, pools, shots, name) for q in questions)
  data = path.relative_to(folder).as_posix()
  if name == "boolq" and not any("\nQuestion:" in q.text for q in questions):
    data += " (questions without their passages)"
  return Task(
    name=name,
    kind=form.kind,
    data=data,
    shots=shots,
    items=items,
    stop=("Question:", "</s>", "<|im_end|>"),
  )


def _questions(
  name: str, form: _Form, files: Sequence[str], folder: str | pathlib.Path
) -> tuple[pathlib.Path, list[_Question]]:
  path, records = task_data.read_records(pathlib.Path(folder), files, name)
  questions = []
  for number, record in enumerate(records, 1):
    try:
      question = form.parse(record)
    except (
      LookupError,
      ArithmeticError,
      ValueError,
      TypeError,
      AttributeError,
    ):
      question = None
    if question is None or not 0 <= question.answer < len(question.choices):
      raise InputError(
        f"{path}: record {number} is no {name} question: mend or remove it"
      )
    questions.append(question)
  if not questions:
    raise InputError(f"{path}: holds no questions: get the file again")
  return path, questions


def _item(
  form: _Form,
  question: _Question,
  pools: Mapping[str, Sequence[_Question]],
  shots: int,
  name: str,
) -> Item:
  examples = pools.get(question.group, ())[:shots] if shots else ()
  if len(examples) < shots:
    raise InputError(
      f"--shots={shots}: there are only {len(examples)} examples for {name}"
      f"{' ' * bool(question.group)}{question.group}: give fewer"
    )
  group = question.group.replace("_", " ")
  solved = "".join(example.solved for example in examples)
  heading = (
    form.heading if group else form.heading.replace(" about {group}", "")
  )
  before = heading.format(group=group) + solved
  return Item(
    context=before + question.text,
    choices=question.choices,
    answer=question.answer,
    contexts=tuple(before + text for text in question.texts),
  )


def _lambada(record: Mapping) -> _Question:
  text, _, word = record["text"].rpartition(" ")
  return _Question(text=text, choices=(f" {word}",))


def _arc(record: Mapping) -> _Question | None:
  if "instruction" in record:
    return _listed(record, "question", "Answer")
  question = record["question"]
  if isinstance(question, Mapping):
    # As the authors publish it.
    listed = question["choices"]
    texts, labels = ([x[key] for x in listed] for key in ("text", "label"))
    question = question["stem"]
  else:
    texts, labels = record["choices"]["text"], record["choices"]["label"]
  return _Question(
    text=f"Question: {question}\nAnswer:",
    choices=tuple(f" {text}" for text in texts),
    answer=labels.index(record["answerKey"]),
  )


def _hellaswag(record: Mapping) -> _Question | None:
  if not isinstance(record["endings"], list):
    return None
  context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
  return _Question(
    text=_without_marks(f"{record['activity_label']}: {context}"),
    choices=tuple(f" {_without_marks(end)}" for end in record["endings"]),
    answer=int(record["label"]),
  )


def _without_marks(text: str) -> str:
  """The text without what WikiHow's pages left in it, as "[step]"."""
  text = text.strip().replace(" [title]", ". ")
  return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _winogrande(record: Mapping) -> _Question:
  """The rest of a sentence is judged behind either word in its gap."""
  sentence = record["sentence"]
  gap = sentence.index("_")
  rest = sentence[gap + 1 :].strip()
  words = (record["option1"], record["option2"])
  return _Question(
    text=sentence[:gap],
    texts=tuple(f"{sentence[:gap]}{word}" for word in words),
    choices=(f" {rest}",) * 2,
    answer=("1", "2").index(str(record["answer"])),
  )


def _piqa(record: Mapping) -> _Question | None:
  if "instruction" in record:
    return _listed(record, "question", "Solution")
  return _Question(
    text=f"Question: {record['goal']}\nAnswer:",
    choices=(f" {record['sol1']}", f" {record['sol2']}"),
    answer=int(record["label"]),
  )


def _listed(record: Mapping, noun: str, label: str) -> _Question | None:
  """A question that was written into an instruction with its options.

  "... to the {noun}: QUESTION\n\n{label}1: ... {label}2: ...\n\nAnswer format:"
  """
  pattern = rf"to the {noun}: (.*?)\s*\n\n{label}1: (.*)\n\nAnswer format: "
  found = re.search(pattern, record["instruction"], re.DOTALL)
  if found is None:
    return None
  options = re.split(rf"\s+{label}\d: ", found[2].strip())
  return _Question(
    text=f"Question: {found[1].strip()}\nAnswer:",
    choices=tuple(f" {option}" for option in options),
    answer=int(record["answer"].removeprefix(label.lower())) - 1,
  )


def _boolq(record: Mapping) -> _Question | None:
  if "instruction" in record:
    found = re.search(
      r"question: (.*?)\?*\s*\n\nAnswer format", record["instruction"], re.S
    )
    if found is None:
      return None
    text, answer = f"Question: {found[1]}?\nAnswer:", record["answer"]
  else:
    question = record["question"].strip().removesuffix("?")
    text = f"{record['passage']}\nQuestion: {question}?\nAnswer:"
    answer = record.get("label", record.get("answer"))
  answers = {"true": 1, "false": 0, "1": 1, "0": 0}
  return _Question(
    text=text, choices=(" no", " yes"), answer=answers[str(answer).lower()]
  )


def _mmlu(record: Mapping) -> _Question:
  choices, answer = record.get("choices"), str(record["answer"])
  if choices is None:
    choices = [record[letter] for letter in _LETTERS]
  lines = [f"{x}. {text}" for x, text in zip(_LETTERS, choices, strict=True)]
  return _Question(
    text="\n".join([record["question"].strip(), *lines, "Answer:"]),
    choices=tuple(f" {letter}" for letter in _LETTERS),
    answer=_LETTERS.index(answer) if answer in _LETTERS else int(answer),
    group=record.get("subject") or "",
  )


def _gsm8k(record: Mapping) -> _Question:
  return _Question(
    text=f"Question: {record['question']}\nAnswer:",
    choices=(f" {record['answer']}",),
  )


_MMLU_HEADING = (
  "The following are multiple choice questions (with answers) about {group}."
  "\n\n"
)


def _arc_files(name: str, part: str) -> tuple[str, ...]:
  """Names of ARC's files: those seen before, and those of its authors."""
  short = f"{name.lower().replace('-', '_')}.{part.lower()}"
  official = f"{name}-{part}"
  return f"{name}.{part.lower()}", official, f"{name}/{official}", short


_FORMS = {
  "lambada": _Form(
    kind=CLOZE, files=("lambada_test", "lambada"), pool=(), parse=_lambada
  ),
  "arc_easy": _Form(
    kind=CHOICE,
    files=_arc_files("ARC-Easy", "Test") + ("arc_easy",),
    pool=_arc_files("ARC-Easy", "Train"),
    parse=_arc,
  ),
  "arc_challenge": _Form(
    kind=CHOICE,
    files=_arc_files("ARC-Challenge", "Test") + ("arc_challenge",),
    pool=_arc_files("ARC-Challenge", "Train"),
    parse=_arc,
  ),
  "hellaswag": _Form(
    kind=CHOICE,
    files=("hellaswag.validation", "hellaswag_val", "hellaswag"),
    pool=("hellaswag.train", "hellaswag_train"),
    parse=_hellaswag,
  ),
  "winogrande": _Form(
    kind=CHOICE,
    files=("winogrande.validation", "winogrande_dev", "winogrande_1.1/dev")
    + ("winogrande", "dev"),
    pool=("winogrande.train", "winogrande_1.1/train_xl", "train_xl"),
    parse=_winogrande,
  ),
  "piqa": _Form(
    kind=CHOICE,
    files=("piqa.validation", "piqa.test", "piqa"),
    pool=("piqa.train",),
    parse=_piqa,
  ),
  "boolq": _Form(
    kind=CHOICE,
    files=("boolq.validation", "boolq.test", "boolq"),
    pool=("boolq.train",),
    parse=_boolq,
  ),
  "mmlu": _Form(
    kind=CHOICE,
    files=("mmlu/test", "mmlu.test", "mmlu_test", "mmlu"),
    pool=("mmlu/dev", "mmlu.dev", "mmlu_dev"),
    parse=_mmlu,
    heading=_MMLU_HEADING,
  ),
  "gsm8k": _Form(
    kind=GENERATION,
    files=("gsm8k_test",),
    pool=("gsm8k_train",),
    parse=_gsm8k,
    shots=5,
  ),
}
NAMES = tuple(_FORMS)


def exact_match(text: str, reference: str) -> tuple[bool, bool]:
  """Whether a generated solution ends in the reference's number.

  Returns:
    By the strict pattern ("#### 12", the first one), and by the flexible one
    (the last number of the text).
  """
  strict = re.findall(r"#### (\-?[0-9\.\,]+)", text)
  numbers = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
  wanted = _plain_number(reference)
  flexible = "".join(numbers[-1]) if numbers else ""
  return (
    bool(strict) and _plain_number(strict[0]) == wanted,
    bool(numbers) and _plain_number(flexible) == wanted,
  )


def _plain_number(text: str) -> str:
  text = re.sub(r"(?s).*#### ", "", text.strip())
  return re.sub(r"\.$", "", re.sub(r"[,$]", "", text)).lower()
