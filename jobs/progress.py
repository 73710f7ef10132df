"""Live progress on the terminal: stage, step, block i/N, elapsed and remaining time, the last gate's numbers."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
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


class Terminal:
    """Shows a run's events: a line per finished step, a bar for the one at hand (on a terminal only)."""

    def __init__(self, console: Console, stages: int) -> None:
        self.console = console
        self.stages = stages
        self.started = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
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

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        if isinstance(event, StepStarted):
            self._forget()
            self.task = self.bar.add_task(self._label(event.name, event.stage), total=None, numbers="")
        elif isinstance(event, Advanced) and self.task is not None:
            numbers = "  ".join(f"{name} {value:.3g}" for name, value in event.numbers.items())
            self.bar.update(self.task, completed=event.done, total=event.total, numbers=numbers)
        elif isinstance(event, StepEnded):
            self._forget()
            how = "was done" if event.resumed else f"{event.seconds:.1f} s"
            elapsed = time.monotonic() - self.started
            self.console.print(
                f"[green]✓[/] {self._label(event.name, event.stage)} [dim]{how} · {elapsed:.0f} s in all[/]"
            )
        elif isinstance(event, GateJudged):
            mark = "[green]passed[/]" if event.passed else "[red]failed[/]"
            self.console.print(f"  gate of stage {event.stage}: {mark}: {event.sentence}")

    def _label(self, name: str, stage: int) -> str:
        return f"stage {stage}/{self.stages}: {name}" if stage else name

    def _forget(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
