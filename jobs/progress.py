"""What a run's progress looks like on a terminal: stage, step, block i/N, elapsed and remaining time, the numbers.

A run on this machine tells it by its events, one on a cluster by its records; both have the same bar.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from workflows.events import Advanced, Event, GateJudged, StepEnded, StepStarted

if TYPE_CHECKING:
    from jobs.following import View


class Bar:
    """A bar for what is at hand, on a terminal only; its times count from where that began."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, what: str) -> None:
        """Something else is at hand now."""
        self.end()
        self.task = self.bar.add_task(what, total=None, numbers="")

    def move(self, done: int, total: int, numbers: str, what: str | None = None) -> None:
        """How far it is (a total of 0 is not known yet), with numbers beside it and perhaps in other words."""
        if self.task is not None:
            self.bar.update(self.task, completed=done, total=total or None, numbers=numbers, description=what)

    def end(self) -> None:
        """Nothing is at hand."""
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


class Terminal(Bar):
    """Shows a run's events: a line per finished step and gate, a bar for the step at hand."""

    def __init__(self, console: Console, stages: int) -> None:
        super().__init__(console)
        self.stages = stages
        self.started = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        if isinstance(event, StepStarted):
            self.begin(at(event.name, event.stage, self.stages))
        elif isinstance(event, Advanced):
            self.move(event.done, event.total, "  ".join(f"{name} {one:.3g}" for name, one in event.numbers.items()))
        elif isinstance(event, StepEnded):
            self.end()
            how = "was done" if event.resumed else f"{event.seconds:.1f} s"
            elapsed = time.monotonic() - self.started
            where = escape(at(event.name, event.stage, self.stages))
            self.console.print(f"[green]✓[/] {where} [dim]{how} · {elapsed:.0f} s in all[/]")
        elif isinstance(event, GateJudged):
            mark = "[green]passed[/]" if event.passed else "[red]failed[/]"
            self.console.print(f"  gate of stage {event.stage}: {mark}: {escape(event.sentence)}")


class Watching(Bar):
    """Shows looks at a run: a bar on a terminal, elsewhere a line whenever the step or the state changes."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.said = ""

    def __call__(self, view: View) -> None:
        """Shows one look at a run."""
        progress = view.last.progress
        what = f"{view.last.started.attempt} {view.state}"
        if progress is not None and not view.over:
            what = f"{what} · {at(progress.step, progress.stage, progress.stages)}"
        line = what
        if view.state == "queued" or (view.seen is not None and view.seen.gangs):
            line = f"{what} · {view.explain().sentence}"
        if what != self.said:
            self.said = what
            self.begin(line)
            if not self.console.is_terminal:
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        done, total, gate = (progress.done, progress.total, progress.gate) if progress else (0, 0, "")
        self.move(done, total, gate, line)


def at(step: str, stage: int, stages: int) -> str:
    """Where a run is: stage 1/2: prune."""
    return f"stage {stage}/{stages}: {step}" if stage else step
