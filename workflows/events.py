"""What a run tells while it goes on; the command line shows it, a notebook may ignore it."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepStarted:
    """A step begins. `stage` counts from 1; 0 is outside the stages."""

    name: str
    stage: int = 0


@dataclass(frozen=True)
class StepEnded:
    """A step's record is in the store; `resumed` when an earlier attempt had written it."""

    name: str
    stage: int
    seconds: float
    resumed: bool


@dataclass(frozen=True)
class Advanced:
    """Some way through a step: block or optimizer step `done` of `total`."""

    name: str
    stage: int
    done: int
    total: int
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GateJudged:
    """A stage was held against its gates; `sentence` says how it went.

    Increases of perplexity over the dense model, over all data and on the worst slice, are shares; None when the model
    is broken.
    """

    stage: int
    passed: bool
    sentence: str
    increase: float | None = None
    worst_increase: float | None = None


Event = StepStarted | StepEnded | Advanced | GateJudged
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener for those who do not listen."""
