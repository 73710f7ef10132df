"""The recipe: what to do to a model. Light (no torch, no ray), strict, one sentence of help per field."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from cluster.strict import Strict

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
MOST = 2**31 - 1
Positive = Annotated[int, Field(ge=1, le=MOST)]
PERPLEXITY_INCREASE, WORST_SLICE_INCREASE = 0.10, 0.20
ACCURACY_DROP, WORST_SLICE_DROP = 0.01, 0.02


class DataSource(Strict):
    """Text that becomes token windows."""

    source: str = Field(
        min_length=1,
        description="A .txt, .jsonl, .parquet, .csv or .tsv file, an s3:// address of one, or builtin:python-docs.",
    )
    text: str = Field("text", description="Column that holds the text (all but .txt).")
    label: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Column that holds each text's class, by name or number: for classifiers, and needed there.",
    )
    slice: str | None = Field(None, description="Column that names each document's slice; gates look at the worst.")
    part: tuple[Share, Share] = Field(
        (0.0, 1.0),
        description="Share of the documents, from and to, so that one source can serve several roles.",
    )
    windows: Positive | None = Field(
        None, description="How many token windows, or labelled texts, to take; all of them if not given."
    )
    length: Annotated[int, Field(ge=8, le=1_048_576)] = Field(
        512, description="Tokens in a window; labelled texts may be shorter, and are cut off there."
    )

    @model_validator(mode="after")
    def _part_is_a_range(self) -> Self:
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part: from {self.part[0]} to {self.part[1]} holds nothing; write [from, to], from < to")
        return self


class Calibration(DataSource):
    """Text for calibration. It has a size unless one is given: workers hold all its activations."""

    windows: Positive = Field(128, description="How many token windows to take; more cost memory, and help little.")


class Data(Strict):
    """The three roles of data; they may never share text."""

    calibration: Calibration = Field(
        Calibration(source="builtin:python-docs", part=(0.0, 0.2)),
        description="Text through which inputs of every linear are observed.",
    )
    tuning: DataSource = Field(
        DataSource(source="builtin:python-docs", part=(0.2, 0.8), length=512),
        description="Text on which the model is repaired between stages.",
    )
    evaluation: DataSource = Field(
        DataSource(source="builtin:python-docs", part=(0.8, 1.0), windows=64, length=512),
        description="Text on which quality is judged.",
    )
    shards: Annotated[int, Field(ge=1, le=4096)] = Field(
        4,
        description="Number of calibration shards: part of the recipe, so that results do not depend on workers.",
    )

    @model_validator(mode="after")
    def _all_roles_are_labelled_or_none(self) -> Self:
        roles = {"calibration": self.calibration, "tuning": self.tuning, "evaluation": self.evaluation}
        labelled = [name for name, role in roles.items() if role.label]
        for name, role in roles.items():
            if labelled and not role.label:
                raise ValueError(
                    f"data.{name} names no label, but data.{labelled[0]} does; a classifier's texts need one in all "
                    f"three roles. One table can serve them, each with its own part; data.{name} reads {role.source}"
                )
        return self

    @model_validator(mode="after")
    def _roles_do_not_overlap(self) -> Self:
        roles = {"calibration": self.calibration, "tuning": self.tuning, "evaluation": self.evaluation}
        names = list(roles)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                one, two = roles[a], roles[b]
                if one.source == two.source and one.part[0] < two.part[1] and two.part[0] < one.part[1]:
                    raise ValueError(
                        f"data.{a} and data.{b} both read {one.source}, parts {list(one.part)} and {list(two.part)} "
                        f"overlap; give each its own part, for example [0.0, 0.5] and [0.5, 1.0]"
                    )
        if self.calibration.windows < self.shards:
            raise ValueError(
                f"data.shards is {self.shards} but data.calibration.windows only {self.calibration.windows}; "
                "every shard needs a window"
            )
        return self


class Target(Strict):
    """What the last stage reaches."""

    pattern: str = Field(
        description='"unstructured", "N:M" such as "2:4" (keep 2 of 4), "BxB" such as "16x16" (whole aligned squares '
        'of weights go; B from 2 to 128), or "ffn" (channels).'
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="Share of the pruned linears' parameters that goes; for N:M it is 1 - N/M."
    )

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        if value in ("unstructured", "ffn"):
            return value
        if (found := re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", value)) and 0 < int(found[1]) < int(found[2]):
            return value
        if (found := re.fullmatch(r"([0-9]{1,3})x\1", value)) and 2 <= int(found[1]) <= 128:
            return value
        raise ValueError(
            f'"{value}" is no pattern; allowed: "unstructured", "ffn", "N:M" with 0 < N < M, '
            'or "BxB" with B from 2 to 128'
        )

    @property
    def n_m(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, else None."""
        if ":" not in self.pattern:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def tile(self) -> int | None:
        """B of a BxB pattern, else None."""
        return int(self.pattern.split("x")[0]) if "x" in self.pattern else None

    @model_validator(mode="after")
    def _ratio_fits_pattern(self) -> Self:
        if self.n_m and abs(self.sparsity - (1 - self.n_m[0] / self.n_m[1])) > 1e-6:
            n, m = self.n_m
            raise ValueError(f"target.sparsity {self.sparsity} cannot be met by pattern {n}:{m}; write {1 - n / m:g}")
        return self


class Solver(Strict):
    """How weights are chosen and the rest repaired."""

    name: Literal["magnitude", "wanda", "sparsegpt", "admm"] = Field(
        "sparsegpt",
        description="magnitude (no data), wanda (inputs' norms), sparsegpt (second order, repairs) or admm (mask and "
        "repair found together, then refitted; slower).",
    )
    damping: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="Share of the Gram's mean diagonal that is added to it; raised when Cholesky fails."
    )
    ratios: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="Growing ratios in which a matrix is pruned, on one set of statistics; with sparsegpt and a refit, "
        "unstructured masks get better by it.",
    )
    refit: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="Steps of least squares on the mask that was found: the survivors make up for what went."
    )
    swaps: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="Rounds of exchanging kept and pruned weights, then refitting, where that lowers a row's error."
    )
    rows: Positive = Field(
        512, description="Most rows of a matrix that one solve task takes; fewer make more tasks, each row dearer."
    )

    @property
    def goes_on(self) -> bool:
        """Whether something follows the solver; that needs the whole Gram, whatever the solver needs."""
        return bool(self.refit or self.swaps)


class Recovery(Strict):
    """Repair of a block's surviving weights right after it was pruned, before the next block sees its outputs."""

    steps: Positive = Field(
        16, description="Adam steps per block toward what the dense model gives there; each sees a window per shard."
    )
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.003, description="First step's length as a share of the weights' root mean square; it falls as a cosine."
    )


class Allocation(Strict):
    """How much each linear gives, so that together they give what a stage removes."""

    policy: Literal["uniform", "owl", "composite", "measured", "evolve"] = Field(
        "uniform",
        description="uniform (all the same), owl (blocks whose inputs have outliers give less), composite (one "
        "threshold on the loss that each weight is worth), measured (each linear is pruned at several levels; "
        "the model's predictions choose among mixes from uniform to the cheapest) or evolve (a search from there on).",
    )
    width: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.1, description="By how much a linear's share may be above or below the stage's sparsity."
    )
    windows: Positive = Field(
        8,
        description="Calibration windows on which predictions are held against the dense model's (measured, evolve); "
        "the few mixes among which the choice is are judged on eight times as many, if there are.",
    )
    generations: Positive = Field(16, description="Rounds of the search (evolve).")
    children: Positive = Field(8, description="Mixes that are tried in a round (evolve).")

    @property
    def tries_levels(self) -> bool:
        """Whether every linear is pruned at several levels first."""
        return self.policy in ("measured", "evolve")

    @property
    def needs_gradients(self) -> bool:
        """Whether it rests on what the rest of the model makes of each linear's outputs."""
        return self.policy in ("composite", "measured", "evolve")


def _spelled_out(value: object) -> object:
    return {"policy": value} if isinstance(value, str) else value


class Tune(Strict):
    """Repair of the surviving weights with DeepSpeed."""

    steps: Positive = Field(200, description="Optimizer steps.")
    batch: Positive = Field(1, description="Windows, or labelled texts, per rank and step.")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(1e-5, description="Peak learning rate of AdamW.")
    warmup: Share = Field(0.1, description="Share of the steps over which the rate rises; then it falls as a cosine.")
    weight_decay: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="AdamW's decoupled weight decay.")
    distill: bool = Field(True, description="Add the KL divergence from the dense model's predictions to the loss.")
    distill_weight: Share = Field(0.5, description="Weight of the KL term; the task's own loss gets the rest.")
    zero: Literal[1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage.")
    ranks: Positive = Field(1, description="Training processes; part of the recipe, because it changes bits.")
    retry_steps: Annotated[int, Field(ge=0, le=MOST)] = Field(
        0, description="Extra steps that a stage may spend once more when its gate fails."
    )


class Stage(Strict):
    """One turn of score, allocate, prune, tune, gate."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(description="Share removed, counted from the dense model.")
    tune: Tune | None = Field(None, description="Repair after pruning; none if not given.")


class Gates(Strict):
    """The conditions a stage must meet.

    For a language model they are increases of perplexity over the dense model (0.1 is 10 %), for a classifier accuracy
    that it may lose (0.01 is one more wrong answer in a hundred).
    """

    perplexity_increase: Annotated[float, Field(ge=0)] = Field(
        PERPLEXITY_INCREASE, description="Allowed over all evaluation data; for language models."
    )
    worst_slice_increase: Annotated[float, Field(ge=0)] = Field(
        WORST_SLICE_INCREASE, description="Allowed for the worst slice; for language models."
    )
    accuracy_drop: Share | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=f"Allowed over all evaluation data; for classifiers, {ACCURACY_DROP} there if not given.",
    )
    worst_slice_drop: Share | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=f"Allowed for the worst slice; for classifiers, {WORST_SLICE_DROP} there if not given.",
    )
    after_failure: Literal["rollback", "stop"] = Field(
        "rollback", description="rollback publishes the last good stage; stop publishes nothing."
    )


class Recipe(Strict):
    """Everything that determines the bytes of the result."""

    model: str = Field(min_length=1, description="A directory, s3:// prefix, hub id or .gguf file; only ever read.")
    data: Data = Field(Data(), description="Calibration, tuning and evaluation text.")
    target: Target = Field(description="Pattern and share that the last stage reaches.")
    solver: Solver = Field(Solver(), description="How weights are chosen and repaired.")
    recovery: Recovery | None = Field(None, description="Repair of each block toward the dense one; none if not given.")
    allocation: Annotated[Allocation, BeforeValidator(_spelled_out)] = Field(
        Allocation(), description="How much each linear gives: a policy's name, or a policy with its fields."
    )
    score: bool = Field(
        False, description="Keep a table of what every linear is worth even where the allocation needs none."
    )
    token_weights: Literal["equal", "gradient"] = Field(
        "equal",
        description="equal: all calibration tokens count the same; gradient: each by how much the loss depends on what "
        "a block gives there, so that errors go where they matter less; takes a gradient pass per stage.",
    )
    propagate: Literal["pruned", "dense"] = Field(
        "pruned",
        description="pruned: blocks in order, each sees what those before have become; dense: each sees what the "
        "stage's first model gives it, so several are solved at once, with more error.",
    )
    stages: tuple[Stage, ...] = Field((), description="Steps toward the target; one untuned step if not given.")
    gates: Gates = Field(Gates(), description="What every stage must meet.")
    format: Literal["huggingface", "compact"] = Field(
        "huggingface",
        description="huggingface: a stock directory; compact: zeros packed away, unpacked by `pull`.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type in which blocks are run and scored.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where blocks are run and solved; it changes bits.")
    threads: Annotated[int, Field(ge=1, le=256)] = Field(1, description="CPU threads per task; it changes bits.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(0, description="Seed of every random choice.")

    @model_validator(mode="after")
    def _stages_lead_to_the_target(self) -> Self:
        if not self.stages:
            object.__setattr__(self, "stages", (Stage(sparsity=self.target.sparsity),))
        ratios = [stage.sparsity for stage in self.stages]
        if ratios != sorted(set(ratios)):
            raise ValueError(f"stages: sparsities {ratios} must rise from stage to stage")
        if ratios[-1] != self.target.sparsity:
            raise ValueError(
                f"stages: the last one's sparsity {ratios[-1]} must be target.sparsity {self.target.sparsity}"
            )
        return self

    @model_validator(mode="after")
    def _format_fits_pattern(self) -> Self:
        if self.format == "compact" and self.target.pattern == "ffn":
            raise ValueError("format: compact packs zeros, but pattern ffn leaves none; use huggingface")
        return self

    @model_validator(mode="after")
    def _allocation_fits(self) -> Self:
        policy = self.allocation.policy
        if policy != "uniform" and self.target.pattern != "unstructured":
            raise ValueError(
                f"allocation: {policy} needs pattern unstructured; {self.target.pattern} takes the same share of all"
            )
        if self.allocation.tries_levels and self.allocation.windows > self.data.calibration.windows:
            raise ValueError(
                f"allocation.windows is {self.allocation.windows}, but data.calibration.windows only "
                f"{self.data.calibration.windows}; they are taken from these"
            )
        return self

    @model_validator(mode="after")
    def _recovery_sees_pruned_blocks(self) -> Self:
        if self.recovery and self.propagate == "dense":
            raise ValueError("recovery repairs a block for the inputs it will have; it needs propagate: pruned")
        return self

    @model_validator(mode="after")
    def _ratios_fit_pattern(self) -> Self:
        if self.solver.ratios > 1 and self.target.pattern == "ffn":
            raise ValueError("solver.ratios: channels go one after the other anyway with pattern ffn; write 1")
        return self

    @model_validator(mode="after")
    def _tokens_are_looked_at(self) -> Self:
        if self.weighs_tokens and self.solver.name == "magnitude" and not self.solver.goes_on:
            raise ValueError(
                "token_weights: gradient weighs what linears read, but solver magnitude reads no data; write equal, "
                "or take another solver"
            )
        return self

    @model_validator(mode="after")
    def _swaps_fit_pattern(self) -> Self:
        if self.solver.swaps and (self.target.tile or self.target.pattern == "ffn"):
            raise ValueError(
                f"solver.swaps exchanges single weights, but with pattern {self.target.pattern} none goes alone; "
                "write 0"
            )
        return self

    @model_validator(mode="after")
    def _rows_hold_whole_tiles(self) -> Self:
        rows, tile = self.solver.rows, self.target.tile
        if tile and rows % tile:
            raise ValueError(
                f"solver.rows {rows} is no multiple of {tile}, which pattern {self.target.pattern} needs; "
                f"write {max(rows // tile, 1) * tile}"
            )
        return self

    @model_validator(mode="after")
    def _gates_fit_the_data(self) -> Self:
        gates = self.gates
        if not self.classifies and (gates.accuracy_drop is not None or gates.worst_slice_drop is not None):
            raise ValueError(
                "gates.accuracy_drop and gates.worst_slice_drop are for classifiers, whose data name a label; "
                "a language model has perplexity_increase and worst_slice_increase"
            )
        asked = (gates.perplexity_increase, gates.worst_slice_increase)
        if self.classifies and asked != (PERPLEXITY_INCREASE, WORST_SLICE_INCREASE):
            raise ValueError(
                "gates.perplexity_increase and gates.worst_slice_increase are for language models; data with a label "
                "are a classifier's, which has accuracy_drop and worst_slice_drop"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_the_other_kinds_gates(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        if self.classifies and "gates" in found:
            found["gates"] = {name: one for name, one in found["gates"].items() if not name.endswith("_increase")}
        return found

    @property
    def classifies(self) -> bool:
        """Whether it is for a classifier: its data have labels."""
        return self.data.evaluation.label is not None

    @property
    def weighs_tokens(self) -> bool:
        """Whether calibration tokens count by their gradients."""
        return self.token_weights == "gradient"

    @property
    def needs_scores(self) -> bool:
        """Whether linears are scored before they are pruned."""
        return self.allocation.policy != "uniform" or self.score

    @property
    def needs_saliency(self) -> bool:
        """Whether linears are scored by what the rest of the model makes of their outputs."""
        return self.allocation.needs_gradients or self.score

    @property
    def needs_gradients(self) -> bool:
        """Whether a stage takes a gradient pass."""
        return self.needs_saliency or self.weighs_tokens

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file, which is converted once and cached."""
        return Path(self.model).suffix == ".gguf"
