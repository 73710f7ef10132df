"""The numbers of an attempt that its other records do not hold: seconds of steps, gates, bytes.

Kept as `runs/<run>/attempts/<n>/measures.json`, so that whoever watches needs neither the driver nor the cluster.
"""

from datetime import UTC, datetime

from pydantic import ValidationError

from cluster.errors import KarikomiError
from cluster.storage import Store
from jobs.records import Record, Started
from workflows.events import Event, GateJudged, StepEnded, by_name


class StepMeasure(Record):
    """A step's seconds; of several of one name in a stage (it is judged twice), their sum."""

    step: str
    stage: int
    seconds: float


class GateMeasure(Record):
    """A stage's gate: by how much the model is worse, as shares; None when it is broken, or judged by the other two."""

    stage: int
    passed: bool
    perplexity_increase: float | None
    worst_slice_increase: float | None
    accuracy_drop: float | None = None
    worst_slice_drop: float | None = None


class Measures(Record):
    """An attempt's numbers so far. `began`: when it first had a driver; until then it was waiting."""

    began: datetime
    steps: tuple[StepMeasure, ...] = ()
    gates: tuple[GateMeasure, ...] = ()
    dense_bytes: int | None = None
    compressed_bytes: int | None = None

    def after(self, event: Event) -> "Measures":
        """With what an event tells."""
        if isinstance(event, StepEnded):
            kept = {(one.step, one.stage): one for one in self.steps}
            at = (event.name, event.stage)
            seconds = event.seconds + (kept[at].seconds if at in kept else 0.0)
            kept[at] = StepMeasure(step=event.name, stage=event.stage, seconds=round(seconds, 3))
            return self.model_copy(update={"steps": tuple(kept.values())})
        if isinstance(event, GateJudged):
            gate = GateMeasure(
                stage=event.stage,
                passed=event.passed,
                **by_name(event.measure, event.increase, event.worst_increase),
            )
            return self.model_copy(update={"gates": (*self.gates, gate)})
        return self

    def of_release(self, dense_bytes: int, compressed_bytes: int) -> "Measures":
        """With what the dense and the published model weigh."""
        return self.model_copy(update={"dense_bytes": dense_bytes, "compressed_bytes": compressed_bytes})


def beginning() -> Measures:
    """An attempt's numbers when it begins."""
    return Measures(began=datetime.now(UTC))


def note_measures(store: Store, started: Started, measures: Measures) -> None:
    """Replaces an attempt's numbers."""
    store.put(_key(started.run, started.number), measures.model_dump_json().encode())


def read_measures(store: Store, run: str, number: int) -> Measures | None:
    """An attempt's numbers; None when there are none, or other code's."""
    try:
        return Measures.model_validate_json(store.get(_key(run, number)))
    except (KarikomiError, ValidationError):
        return None


def _key(run: str, number: int) -> str:
    return f"runs/{run}/attempts/{number}/measures.json"
