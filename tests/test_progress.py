import io
import re
import time

import pytest

from l2d_ray.distributed import progress
from l2d_ray.distributed.progress import Progress


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_lines_come_also_while_nothing_advances(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.2)
    with Progress(10, "fine-tuning", "steps") as bar:
        time.sleep(0.3)
        bar.advance(4, "loss 1.25")
        time.sleep(0.5)
    first, *later = capsys.readouterr().err.splitlines()
    assert first == "fine-tuning: 0 of 10 steps in 00:00"
    assert len(later) >= 2
    for line in later:
        assert re.fullmatch(r"fine-tuning: 4 of 10 steps in 00:0\d, [\d.]+ steps/s, 00:0\d left, loss 1.25", line)


def test_a_pass_leaves_one_line_unless_it_was_short_or_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(2, "moments", "tasks") as bar:
        bar.advance(2)
    monkeypatch.setattr(progress, "SHORT", 0.0)
    with pytest.raises(OSError, match="no space"), Progress(2, "space", "tasks"):
        raise OSError("no space")
    assert capsys.readouterr().err == ""
    with Progress(2, "shards", "tasks") as bar:
        bar.advance(2)
    with Progress(None, "read"):
        pass
    shards, read = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"shards: 2 of 2 tasks in 00:00, [\d,]+ tasks/s", shards)
    assert read == "read: 00:00"


def test_the_rate_of_a_resumed_pass_is_that_of_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1000, "fine-tuning", "steps") as bar:
        bar.resume_at(900)
        time.sleep(1.1)
        bar.advance(50)
    (line,) = capsys.readouterr().err.splitlines()
    done, rate, left = re.findall(r": (\d+) of 1000 steps in 00:01, (\d+) steps/s, 00:0(\d) left", line)[0]
    assert (done, left) == ("950", "1")
    assert 25 <= int(rate) <= 50


def test_on_a_terminal_the_bar_makes_way_for_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "SHORT", 0.0)
    with Progress(3, "validation", "ranks") as bar:
        time.sleep(0.2)
        bar.advance(3)
    *bars, last, end = re.split("[\r\n]", terminal.getvalue())
    assert any("validation: 100%" in shown and "3/3" in shown for shown in bars)
    assert last.startswith("validation: 3 of 3 ranks")
    assert end == ""
