"""Everything that a run measured, as one model: JSON is this, the page and the tables are made of it."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from workflows.evaluation.cost import Cost
from workflows.evaluation.gates import Verdict
from workflows.evaluation.latency import Footprint, PairedTiming
from workflows.evaluation.measures import Measure, measure_of
from workflows.evaluation.quality import Quality


class StageHistory(BaseModel):
    """One stage's numbers: after pruning, after tuning (None: not tuned), and how it was judged."""

    model_config = ConfigDict(frozen=True)

    stage: int
    sparsity: float
    parameters: int
    pruned: Quality
    tuned: Quality | None
    retried: bool
    verdict: Verdict

    @property
    def final(self) -> Quality:
        """The quality that was judged."""
        return self.tuned or self.pruned


class Size(BaseModel):
    """What a model weighs. `compact_bytes`: with zeros packed away; None where there are none."""

    model_config = ConfigDict(frozen=True)

    parameters: int
    block_parameters: int  # of the linears inside blocks, the only ones that are pruned
    zeros: int
    weight_bytes: int
    compact_bytes: int | None


class Measured(BaseModel):
    """Dense and compressed model, measured in the same process on the same machine."""

    model_config = ConfigDict(frozen=True)

    timings: tuple[PairedTiming, ...]
    dense_footprint: Footprint
    compressed_footprint: Footprint
    machine: dict[str, str]
    threads: int

    @property
    def phases(self) -> list[PairedTiming]:
        """Every phase at the first shape: prefill and decode, or a classifier's only one."""
        return [one for one in self.timings if one.shape == self.timings[0].shape]


class Report(BaseModel):
    """A run's report.

    Attributes:
        name, run, tenant-free: what was made, and by which run.
        target: what was asked for; `stage` is the one that is published, of `stages`.
        dense: quality of the dense model.
        history: the stages, failed ones too.
        dense_size, compressed_size: what both weigh.
        measured: latency and memory.
        cost: money.
        step_seconds: how long each step took.
        recipe: as resolved.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    run: str
    model: str
    source_digest: str
    model_digest: str
    pattern: str
    stage: int
    stages: int
    dense: Quality
    history: tuple[StageHistory, ...]
    dense_size: Size
    compressed_size: Size
    measured: Measured
    cost: Cost
    step_seconds: dict[str, float]
    recipe: dict[str, Any]
    karikomi: str
    created: str

    @property
    def published_stage(self) -> StageHistory:
        """The stage whose model is published."""
        return self.history[self.stage - 1]

    @property
    def compressed(self) -> Quality:
        """Quality of the published model."""
        return self.published_stage.final

    @property
    def measure(self) -> Measure:
        """What the models are judged by."""
        return measure_of(self.dense)
