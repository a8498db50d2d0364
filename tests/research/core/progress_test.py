from research.core.progress import Progress


def test_without_a_terminal_lines_come_now_and_then(capsys):
  bar = Progress(4, 1, "work", seconds_between_lines=3600.0)
  for done in (2, 3, 4):
    bar.update(done, {"loss": 0.123456})
  bar.close()
  out, err = capsys.readouterr()
  assert out == ""
  assert err == "work: 4/4  loss 0.1235  00:00 left\n"


def test_disabled_says_nothing(capsys):
  bar = Progress(1, enabled=False)
  bar.update(1)
  bar.close()
  assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  bar = Progress(4, 2, "work")
  bar.update(4, {"loss": 0.5})
  bar.close()
  err = capsys.readouterr().err
  assert "work" in err and "4/4" in err and "loss=0.5" in err
