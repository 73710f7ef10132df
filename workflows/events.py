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

    By how much the model is worse than the dense one, over all data and on the worst slice, is told as shares, of the
    `measure` that it is judged by; None when it is broken.
    """

    stage: int
    passed: bool
    sentence: str
    increase: float | None = None
    worst_increase: float | None = None
    measure: str = "perplexity"


def by_name(measure: str, increase: float | None, worst: float | None) -> dict[str, float | None]:
    """A gate's two numbers by the names that records and tables have for them; the other measure's are None."""
    perplexity, accuracy = (measure == one for one in ("perplexity", "accuracy"))
    return {
        "perplexity_increase": increase if perplexity else None,
        "worst_slice_increase": worst if perplexity else None,
        "accuracy_drop": increase if accuracy else None,
        "worst_slice_drop": worst if accuracy else None,
    }


Event = StepStarted | StepEnded | Advanced | GateJudged
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener for those who do not listen."""
