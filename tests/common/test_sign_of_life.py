"""What takes long says so: bars on a terminal, lines elsewhere, nothing for what is short."""

import io
import logging
import sys
import time

import pytest

from gkd.common import sign_of_life
from gkd.common.sign_of_life import SignOfLife, above_the_bars


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def wait_for(self, text):
        """A minute at most, for a machine that is busy."""
        for _ in range(6000):
            if text in self.getvalue():
                return
            time.sleep(0.01)
        raise AssertionError(f"{text!r} is not in {self.getvalue()!r}")


class Log(Terminal):
    def isatty(self):
        return False


@pytest.fixture
def hasty(monkeypatch):
    """Hundredths of a second in the place of seconds."""
    for name, value in (("FIRST", 0.05), ("MOST", 0.1), ("_LOOK", 0.01), ("_SHORT", 0.02)):
        monkeypatch.setattr(sign_of_life, name, value)
    monkeypatch.delenv("RANK", raising=False)


def test_a_log_gets_a_line_after_a_while_and_again(hasty, monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := Log())
    with SignOfLife("measuring the teacher", 64, "sequence") as sign:
        log.wait_for("measuring the teacher: 0 of 64 sequences after 0:00\n")
        sign.tick(16)
        log.wait_for("measuring the teacher: 16 of 64 sequences after 0:00\n")
    said = log.getvalue()
    time.sleep(0.2)
    assert log.getvalue() == said
    assert "\r" not in said


def test_the_innermost_speaks_and_what_is_short_says_nothing(hasty, monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := Log())
    with SignOfLife("outer"), SignOfLife("inner"):
        log.wait_for("inner: 0:00 so far\n")
        assert "outer" not in log.getvalue()
    monkeypatch.setattr(sign_of_life, "FIRST", 60.0)
    monkeypatch.setattr(sys, "stderr", log := Log())
    with SignOfLife("short"):
        time.sleep(0.1)
    assert log.getvalue() == ""


def test_a_notebook_is_a_process_that_is_a_kernel_not_one_that_has_its_package(monkeypatch):
    from ipykernel.kernelapp import IPKernelApp

    monkeypatch.setattr(sys, "stderr", Log())
    assert not sign_of_life.on_terminal()
    monkeypatch.setattr(IPKernelApp, "_instance", object())
    assert sign_of_life.on_terminal()


def test_other_ranks_are_silent(hasty, monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := Log())
    monkeypatch.setenv("RANK", "1")
    with SignOfLife("loading") as sign:
        sign.tick()
        time.sleep(0.2)
    assert log.getvalue() == ""
    assert sign.done == 1


@pytest.mark.parametrize(
    ("sign", "seconds", "line"),
    [
        (SignOfLife("loading models and rows"), 75.9, "loading models and rows: 1:15 so far"),
        (SignOfLife("training", 1200, "step", done=30), 3605, "training: 30 of 1,200 steps after 60:05"),
        (SignOfLife("evaluating", None, "batch"), 10, "evaluating: 0 batches after 0:10"),
    ],
)
def test_how_far_and_for_how_long(sign, seconds, line):
    assert sign.line(seconds) == line


def test_a_terminal_gets_a_bar_with_other_lines_above_it(hasty, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    handler = logging.StreamHandler()
    owner = logging.getLogger("of.this.test")
    owner.addHandler(handler)
    with SignOfLife("student", 4, "sequence") as sign:
        sign.tick(4)
        terminal.wait_for("4/4")
        owner.warning("a line")
        with above_the_bars():
            print("a table")
    owner.removeHandler(handler)
    assert handler.stream is terminal
    *_, before, after = terminal.getvalue().rpartition("a line\n")
    assert before == "a line\n"
    assert after.lstrip("\r").startswith("student: 100%")
    assert out.getvalue().endswith("a table\n")
    assert terminal.getvalue().endswith("\r")
    assert not terminal.getvalue().rpartition("\r")[2]


def test_what_counts_nothing_shows_the_time(hasty, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with SignOfLife("loading models and rows"):
        terminal.wait_for("loading models and rows: 00:00")
    assert terminal.getvalue().endswith("\r")
