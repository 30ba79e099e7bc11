"""Progress of long work: what a log gets, what a terminal shows, and that no thread runs where processes are forked."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from mmrep import progress as module
from mmrep.progress import progress, track


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))  # not rich's
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 20.0)
    with progress("shards", 8, "rows") as advance:  # begins at 0 s, then ten seconds a step
        for _ in range(4):
            advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "shards: 6/8 rows, 0.2/s, 10 s left" and lines[-1].startswith("shards: 8 rows in ")


def test_quick_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(5), 5, "pictures")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_a_bar_that_no_thread_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fork while a thread draws may copy a lock that nobody will ever release."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    threads = threading.active_count()
    for _ in track(range(3), 3, "pictures"):
        assert threading.active_count() == threads
    shown = capsys.readouterr().err
    assert "pictures" in shown and "3/3" in shown
