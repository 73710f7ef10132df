"""What a run looks like while it goes on: by its events here, by its records elsewhere."""

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from jobs.following import View
from jobs.progress import Terminal, Watching
from jobs.records import Attempt, Progress, Run, Started
from workflows.events import Advanced, GateJudged, StepEnded, StepStarted

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
STARTED = Started(run="chat-1", number=1, tenant="t", name="chat", by="ann", cluster="http://head:8265", at=NOW)


@pytest.fixture
def pipe():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)


def view(**progress) -> View:
    told = Progress(at=NOW, stages=2, **progress) if progress else None
    return View(Run(run="chat-1", attempts=(Attempt(started=STARTED, progress=told, ended=None),)), None, NOW)


def test_events_leave_a_line_for_each_step_and_gate(pipe):
    with Terminal(pipe, 2) as terminal:
        for event in (StepStarted("prune", 1), Advanced("prune", 1, 3, 18), StepEnded("prune", 1, 2.5, resumed=False)):
            terminal(event)
        terminal(StepEnded("report", 0, 0.0, resumed=True))
    step, resumed = pipe.file.getvalue().splitlines()
    assert step.startswith("✓ stage 1/2: prune 2.5 s · ")
    assert resumed.startswith("✓ report was done · ")


def test_what_users_call_their_slices_is_no_markup(screen):
    sentence = "perplexity rose 2 %, worst slice [/red] 3 %"
    with Terminal(screen, 1) as terminal:
        terminal(GateJudged(1, True, sentence))
    with Watching(screen) as watching:
        watching(view(step="judge", stage=1, gate=sentence))
    assert f"gate of stage 1: passed: {sentence}" in screen.file.getvalue()
    assert screen.file.getvalue().count(sentence) >= 2


def test_both_have_the_same_bar(screen):
    with Terminal(screen, 2) as terminal:
        terminal(StepStarted("prune", 1))
        terminal(Advanced("prune", 1, 3, 18, {"loss": 0.25}))
        terminal.bar.refresh()
    here = screen.file.getvalue()
    with Watching(screen) as watching:
        watching(view(step="prune", stage=1, done=3, total=18, gate="perplexity rose 2 %"))
    there = screen.file.getvalue().removeprefix(here)
    for said, where, numbers in (
        (here, "stage 1/2: prune", "loss 0.25"),
        (there, "chat-1-a1 running · stage 1/2: prune", "perplexity rose 2 %"),
    ):
        assert all(one in said for one in (where, " 3/18 ", "left", numbers))


def test_away_from_a_terminal_a_line_comes_only_with_something_new(pipe):
    with Watching(pipe) as watching:
        for one in (view(), view(), view(step="prune", stage=1, done=1, total=9), view(step="prune", stage=1, done=2)):
            watching(one)
        watching(View(view(step="prune", stage=1).run, None, NOW + timedelta(hours=1)))
    queued, running, lost = pipe.file.getvalue().splitlines()
    assert queued.startswith("chat-1-a1 queued · ")
    assert (running, lost) == ("chat-1-a1 running · stage 1/2: prune", "chat-1-a1 lost")
