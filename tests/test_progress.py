"""Progress on a terminal: short work shows no bar, and what is said about a failure has a line of its own."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

import fasttrain_data.progress
from fasttrain import cli
from fasttrain.errors import UserError
from fasttrain.progress import Progress, close_bars, say, ticker


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_short_work_shows_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on_a_terminal(monkeypatch)
    ticker("reading pairs", 3)(3)
    assert capsys.readouterr().err == ""


def test_a_mistake_does_not_follow_the_bar_of_what_it_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: Any) -> None:
        Progress("reading pairs", 3, "rows").tick()
        raise UserError("pairs.jsonl line 2: wrong")

    on_a_terminal(monkeypatch)
    monkeypatch.setattr(cli, "cli", fails)
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err.split("\r")
    assert "reading pairs" in shown[1] and "? rows/s" in shown[1] and not shown[-2].strip()
    assert shown[-1] == "fasttrain: error: pairs.jsonl line 2: wrong\n"


def test_a_bar_is_closed_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    on_a_terminal(monkeypatch)
    with Progress("dpo", 3, "steps"):
        close_bars()
        capsys.readouterr()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("there", [True, False])
def test_what_stands_in_the_place_of_stderr_need_not_know_terminals(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program's own tee ended in an AttributeError, and so did None, which a process without a stderr has there."""
    told: list[str] = []
    tee = SimpleNamespace(write=told.append, flush=lambda: None) if there else None
    monkeypatch.setattr(sys, "stderr", tee)
    fasttrain_data.progress.Progress(3, "rows").add()
    Progress("dpo", 3, "steps").tick()
    say("resumed")
    assert told == (["resumed", "\n"] if there else [])
