import json

import pytest

from models.errors import InputError
from research.evaluation import tasks


def write(folder, name, records):
  (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))


def only(name, folder, **options):
  """The one item of a task."""
  (item,) = tasks.load_task(name, folder, **options).items
  return item


def test_lambada_asks_for_the_last_word(tmp_path):
  write(tmp_path, "lambada_test.jsonl", [{"text": "He said\n\n“I see a cat"}])
  item = only("lambada", tmp_path)
  assert item.context == "He said\n\n“I see a"
  assert item.choices == (" cat",)


ARC = {
  "instruction": "Please choose the correct answer to the question: What is "
  "wet?\n\nAnswer1: sand. Answer2: water Answer3: a dry\nplace\n\n"
  "Answer format: answer1/answer2/answer3",
  "output": "the correct answer is answer2",
  "answer": "answer2",
}
ARC_PLAIN = {
  "question": "What is wet?",
  "choices": {"text": ["sand.", "water", "a dry\nplace"], "label": [*"123"]},
  "answerKey": "2",
}

# As its authors publish it.
ARC_OFFICIAL = {
  "id": "Mercury_1",
  "question": {
    "stem": "What is wet?",
    "choices": [
      {"text": text, "label": label}
      for text, label in zip(ARC_PLAIN["choices"]["text"], "ABC", strict=True)
    ],
  },
  "answerKey": "B",
}


@pytest.mark.parametrize("record", [ARC, ARC_PLAIN, ARC_OFFICIAL])
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_arc_answers_are_continuations(tmp_path, name, record):
  stem = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}[name]
  write(tmp_path, f"{stem}.test.jsonl", [record])
  item = only(name, tmp_path)
  assert item.context == "Question: What is wet?\nAnswer:"
  assert item.choices == (" sand.", " water", " a dry\nplace")
  assert item.answer == 1


@pytest.mark.parametrize("name", ["ARC-Easy-Test", "ARC-Easy/ARC-Easy-Test"])
def test_arc_lies_as_its_archive_has_it(tmp_path, name):
  (tmp_path / "ARC-Easy").mkdir()
  write(tmp_path, f"{name}.jsonl", [ARC_OFFICIAL])
  write(tmp_path, "ARC-Easy-Train.jsonl", [ARC_OFFICIAL, ARC_PLAIN])
  task = tasks.load_task("arc_easy", tmp_path, shots=2)
  solved = "Question: What is wet?\nAnswer: water\n\n"
  assert task.items[0].context == 2 * solved + "Question: What is wet?\nAnswer:"
  assert task.data == f"{name}.jsonl"


HELLASWAG = {
  "ind": 24,
  "activity_label": "Roof shingle removal",
  "ctx_a": "A man is sitting [header] on a  roof.",
  "ctx_b": "he Then",
  "ctx": "A man is sitting on a roof. he Then",
  "split": "val",
  "endings": ["wraps it [title] Up", " rips [step] tiles.", "sits", "stands"],
  "label": 1,
}


@pytest.mark.parametrize("label", [1, "1"])
def test_hellaswag_endings_are_continuations(tmp_path, label):
  """As the harness asks: marks of web pages go, ctx_b gets a capital."""
  write(tmp_path, "hellaswag_val.jsonl", [HELLASWAG | {"label": label}])
  write(tmp_path, "hellaswag_train.jsonl", [HELLASWAG | {"ctx_b": ""}])
  item = only("hellaswag", tmp_path)
  text = "Roof shingle removal: A man is sitting on a roof."
  assert item.context == f"{text} He then"
  assert item.choices == (" wraps it. Up", " rips tiles.", " sits", " stands")
  assert item.answer == 1
  item = only("hellaswag", tmp_path, shots=1)
  assert item.context == f"{text} rips tiles.\n\n{text} He then"


WINOGRANDE = {
  "qID": "1",
  "sentence": "Sarah was better than Maria so _ always got the easy cases.",
  "option1": "Sarah",
  "option2": "Maria",
  "answer": "2",
}


@pytest.mark.parametrize(
  "name", ["winogrande_1.1/dev", "dev", "winogrande.validation"]
)
def test_winogrande_judges_the_rest_behind_either_word(tmp_path, name):
  (tmp_path / "winogrande_1.1").mkdir()
  write(tmp_path, f"{name}.jsonl", [WINOGRANDE])
  write(tmp_path, "winogrande_1.1/train_xl.jsonl", [WINOGRANDE])
  item = only("winogrande", tmp_path)
  first = "Sarah was better than Maria so "
  rest = " always got the easy cases."
  assert item.pairs == [(first + "Sarah", rest), (first + "Maria", rest)]
  assert item.answer == 1
  item = only("winogrande", tmp_path, shots=1)
  assert item.contexts[0] == f"{first}Maria{rest}\n\n{first}Sarah"


PIQA = {
  "instruction": "Please choose the correct solution to the question: dresser"
  "\n\nSolution1: use a saw \n\nSolution2: use  a pin \n\n"
  "Answer format: solution1/solution2",
  "answer": "solution1",
}
PIQA_PLAIN = {
  "goal": "dresser", "sol1": "use a saw", "sol2": "use  a pin", "label": 0,
}  # fmt: skip


@pytest.mark.parametrize("record", [PIQA, PIQA_PLAIN])
def test_piqa_solutions_are_continuations(tmp_path, record):
  write(tmp_path, "piqa.test.jsonl", [record])
  item = only("piqa", tmp_path)
  assert item.context == "Question: dresser\nAnswer:"
  assert item.choices == (" use a saw", " use  a pin")
  assert item.answer == 0


def test_boolq_with_and_without_passages(tmp_path):
  record = {
    "instruction": "Please answer the following question with true or false, "
    "question: is it cold?\n\nAnswer format: true/false",
    "answer": "true",
  }
  write(tmp_path, "boolq.test.jsonl", [record])
  task = tasks.load_task("boolq", tmp_path)
  assert task.items[0].context == "Question: is it cold?\nAnswer:"
  assert task.items[0].choices == (" no", " yes")
  assert task.items[0].answer == 1
  assert "without their passages" in task.data
  for answer in (False, 0, "false"):
    plain = {"question": "is it cold", "passage": "Ice.", "answer": answer}
    write(tmp_path, "boolq.test.jsonl", [plain])
    task = tasks.load_task("boolq", tmp_path)
    assert task.items[0].context == "Ice.\nQuestion: is it cold?\nAnswer:"
    assert task.items[0].answer == 0
    assert task.data == "boolq.test.jsonl"


def _mmlu(folder):
  for part in ("test", "dev"):
    (folder / "mmlu" / part).mkdir(parents=True)
  (folder / "mmlu/test/us_history_test.csv").write_text(" Who? ,a,b,c,d,2\n")
  examples = "".join(f"Example {i}?,e,f,g,h,{'ABCD'[i]}\n" for i in range(3))
  (folder / "mmlu/dev/us_history_dev.csv").write_text(examples)
  (folder / "mmlu/dev/anatomy_dev.csv").write_text("Bone?,e,f,g,h,A\n")


def test_mmlu_shows_examples_of_the_subject(tmp_path):
  _mmlu(tmp_path)
  heading = (
    "The following are multiple choice questions (with answers) about us "
    "history.\n\n"
  )
  asked = "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
  item = only("mmlu", tmp_path)
  assert item.context == heading + asked
  assert item.choices == (" A", " B", " C", " D") and item.answer == 2
  item = only("mmlu", tmp_path, shots=2)
  options = "?\nA. e\nB. f\nC. g\nD. h\nAnswer: "
  examples = f"Example 0{options}A\n\nExample 1{options}B\n\n"
  assert item.context == heading + examples + asked
  with pytest.raises(InputError, match="only 3 examples.*us_history"):
    tasks.load_task("mmlu", tmp_path, shots=5)


@pytest.mark.parametrize(
  "form",
  [
    {"choices": [*"abcd"], "answer": 2},
    {"choices": [*"abcd"], "answer": "C"},
    dict(zip("ABCD", "abcd", strict=True), answer="C"),
  ],
)
@pytest.mark.parametrize("name", ["mmlu_test", "mmlu/test/anatomy_test"])
def test_mmlu_in_json_lines(tmp_path, name, form):
  record = {"question": "Who?", "subject": "us_history"} | form
  (tmp_path / "mmlu/test").mkdir(parents=True)
  if "/" in name:
    del record["subject"]
  else:
    (tmp_path / "mmlu/test").rmdir()
  write(tmp_path, f"{name}.jsonl", [record])
  item = only("mmlu", tmp_path)
  subject = "anatomy" if "/" in name else "us history"
  assert item.context.startswith(
    "The following are multiple choice questions (with answers) about "
    f"{subject}.\n\nWho?\nA. a\nB. b"
  )
  assert item.choices == (" A", " B", " C", " D") and item.answer == 2
  if record.pop("subject", None):
    write(tmp_path, f"{name}.jsonl", [record])
    assert "(with answers).\n\nWho?" in only("mmlu", tmp_path).context


def test_gsm8k_shows_solved_examples(tmp_path):
  record = {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
  write(tmp_path, "gsm8k_test.jsonl", [record])
  item = only("gsm8k", tmp_path, shots=0)
  assert item.context == "Question: 1 + 1?\nAnswer:"
  write(tmp_path, "gsm8k_train.jsonl", [record] * 6)
  task = tasks.load_task("gsm8k", tmp_path)
  solved = "Question: 1 + 1?\nAnswer: It is <<1+1=2>>2.\n#### 2\n\n"
  assert task.items[0].context == 5 * solved + "Question: 1 + 1?\nAnswer:"
  assert task.shots == 5 and "Question:" in task.stop
  assert task.kind == tasks.GENERATION


@pytest.mark.parametrize(
  "text, strict, flexible",
  [
    (" It is 12.\n#### 1,234", True, True),
    (" It is $1234.", False, True),
    (" #### 12\nor #### 1234", False, True),
    (" #### 1234\nor 5", True, False),
    (" none", False, False),
    ("", False, False),
  ],
)
def test_exact_match(text, strict, flexible):
  found = tasks.exact_match(text, "So <<1,000+234=1234>>.\n#### 1,234")
  assert found == (strict, flexible)


def test_a_limit_takes_items_from_all_over(tmp_path):
  records = [{"text": f"a {i}"} for i in range(10)]
  write(tmp_path, "lambada.jsonl", records)
  task = tasks.load_task("lambada", tmp_path, limit=4)
  words = [item.choices[0] for item in task.items]
  assert words == [" 0", " 2", " 5", " 7"]
  assert len(tasks.load_task("lambada", tmp_path, limit=99).items) == 10


@pytest.mark.parametrize(
  "name, record",
  [
    ("lambada", {"txt": "a b"}),
    ("piqa", PIQA | {"answer": "solution3"}),
    ("piqa", PIQA | {"instruction": "Choose."}),
    ("piqa", PIQA_PLAIN | {"label": -1}),
    ("boolq", {"question": "a", "passage": "b", "answer": "maybe"}),
    ("hellaswag", HELLASWAG | {"label": ""}),
    ("hellaswag", HELLASWAG | {"label": 4}),
    ("hellaswag", HELLASWAG | {"label": float("inf")}),
    ("hellaswag", HELLASWAG | {"endings": "abcd"}),
    ("winogrande", WINOGRANDE | {"answer": ""}),
    ("winogrande", WINOGRANDE | {"sentence": "no gap"}),
    ("arc_easy", ARC_OFFICIAL | {"answerKey": "D"}),
    ("arc_easy", ARC_OFFICIAL | {"question": {"stem": "a"}}),
    ("mmlu", {"question": "a", "choices": [*"abc"], "answer": 0}),
  ],
)
def test_malformed_records_are_named(tmp_path, name, record):
  good = {"lambada": {"text": "a b"}, "piqa": PIQA}.get(name)
  records = [record] if good is None else [good, record]
  write(tmp_path, f"{name}.jsonl", records)
  with pytest.raises(InputError, match=f"record {len(records)} is no {name}"):
    tasks.load_task(name, tmp_path)


def test_bad_requests_are_named(tmp_path):
  with pytest.raises(InputError, match="swag.*lambada"):
    tasks.load_task("swag", tmp_path)
  with pytest.raises(InputError, match="--data"):
    tasks.load_task("piqa", None)
  with pytest.raises(InputError, match="--shots=1.*lambada"):
    tasks.load_task("lambada", tmp_path, shots=1)
  write(tmp_path, "piqa.jsonl", [])
  with pytest.raises(InputError, match="no questions"):
    tasks.load_task("piqa", tmp_path)
