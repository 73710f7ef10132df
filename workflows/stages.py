"""The steps of a stage: prune, tune and judge one model state. Each is what `compress` hands to the journal."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch

from cluster.errors import InputError
from cluster.layerwise import run_blocks
from cluster.remote import call_each, share_out
from cluster.spec import ClusterSpec
from cluster.storage import Stored, open_store
from workflows.blockwork import DensePruneStage, PruneStage
from workflows.calibrated import as_asked
from workflows.data.windows import Windows, from_parquet
from workflows.evaluation.quality import Quality, measure_quality, merge
from workflows.models.checkpoint import Checkpoint
from workflows.models.expert_names import expert_count
from workflows.models.families import family_of, most_tokens
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.pruning.ffn import keep_count
from workflows.pruning.patterns import parse
from workflows.recipe import Recipe
from workflows.scored import ScoreStage
from workflows.steps import Work

Stop = Callable[[], bool]


def config_after(dense: dict[str, Any], recipe: Recipe, sparsity: float) -> dict[str, Any]:
    """The model's config after a stage: narrower MLPs for `ffn`, unchanged for zeros.

    Raises:
        InputError: the ratio cannot be met by whole channels, or the model has no one MLP to take them from.
    """
    if recipe.target.pattern != "ffn":
        return dense
    if expert_count(dense):
        raise InputError(
            f"target.pattern: ffn takes channels of a block's one MLP, but {dense['model_type']} has "
            f"{expert_count(dense)} experts per block",
            'Use "unstructured" or an N:M pattern.',
        )
    try:
        return dense | {"intermediate_size": keep_count(int(dense["intermediate_size"]), sparsity)}
    except ValueError as error:
        raise InputError(f"stages: sparsity {sparsity}: {error}") from error


def check_task(dense: ModelState, recipe: Recipe) -> None:
    """Whether the data are what a model of this kind needs: texts with labels for a classifier, else without.

    Raises:
        InputError: they are not, or longer than a classifier has positions for; names the field.
    """
    what = dense.config["architectures"][0]
    if not family_of(dense.config).classifies:
        if recipe.classifies:
            raise InputError(f"data.evaluation.label: {what} is a language model, which has no use for labels")
        return
    if not recipe.classifies:
        raise InputError(
            f"data.evaluation.label: {what} is a classifier: it needs labelled texts in all three roles",
            "Name a table's column of labels; `karikomi fields` tells of `label`.",
        )
    most = most_tokens(dense.config)
    for role in ("calibration", "tuning", "evaluation"):
        length = getattr(recipe.data, role).length
        if length > most:
            raise InputError(f"data.{role}.length: {length} tokens, but the model has positions for {most}")


def check_pattern(dense: ModelState, recipe: Recipe) -> None:
    """Whether every linear of the model can take the pattern.

    Raises:
        InputError: names the linear whose columns are no multiple of M, or whose rows or columns are none of B.
    """
    if recipe.target.pattern == "ffn":
        return
    group = parse(recipe.target.pattern)
    checkpoint = Checkpoint(dense)
    for name, shape in checkpoint.shapes().items():
        if not checkpoint.is_prunable(name, shape):
            continue
        for what, length, step in (("rows", shape[0], group.tile), ("columns", shape[1], group.size * group.tile)):
            if length % step:
                raise InputError(
                    f"target.pattern: {recipe.target.pattern} cannot be met: {name} has {length} {what}, "
                    f"no multiple of {step}"
                )


def prune(
    work: Work,
    before: ModelState,
    dense: ModelState,
    config: dict[str, Any],
    windows: Stored,
    recipe: Recipe,
    sparsity: float,
    shares: tuple[Mapping[str, float], ...],
    norms: Stored | None,
    cluster: ClusterSpec,
    stop: Stop,
) -> ModelState:
    """Prunes every block with the layer-wise engine; goes on after the blocks that were recorded before."""
    stage = (PruneStage if recipe.propagate == "pruned" else DensePruneStage)(
        **as_asked(recipe, before, windows),
        norms=norms,
        dense=dense,
        config=config,
        pattern=recipe.target.pattern,
        sparsity=sparsity,
        solver=recipe.solver,
        recovery=recipe.recovery,
        shares=shares,
        key_prefix=work.prefix("blocks"),
    )

    return before.model_copy(update={"config": config, "blocks": all_blocks(work, stage, cluster, stop)})


def all_blocks(work: Work, stage: PruneStage | ScoreStage, cluster: ClusterSpec, stop: Stop) -> tuple[Stored, ...]:
    """What the layer-wise engine makes of every block; each is recorded, and recorded ones are not done again."""

    def on_block(block: int, stored: Stored) -> None:
        work.record_block(block, stored)
        work.advanced(block + 1, stage.block_count)

    return tuple(run_blocks(stage, cluster, stage.threads, work.finished_blocks(), on_block, stop))


def evaluate(
    work: Work, state: ModelState, windows: Stored, recipe: Recipe, cluster: ClusterSpec, stop: Stop
) -> Quality:
    """Judges a model on the evaluation windows, some windows per task; the split does not change the result."""
    count = len(_windows(state, windows, "evaluation").slices)
    parts = call_each(
        evaluate_part,
        [(state, windows, own, recipe) for own in share_out(range(count), cluster.workers)],
        cpus=recipe.threads,
        gpus=cluster.gpus_per_worker,
        stop=stop,
        on_done=work.advanced,
        stuck_after=cluster.block_seconds,
    )
    return merge(parts)


def evaluate_part(state: ModelState, windows: Stored, own: Sequence[int], recipe: Recipe) -> Quality:
    """Quality on some consecutive evaluation windows; runs in a task."""
    torch.set_num_threads(recipe.threads)
    part = _windows(state, windows, "evaluation").part(own[0], own[-1] + 1)
    model = load_model(state, getattr(torch, serving_dtype(state))).to(recipe.device)
    return measure_quality(model, part)


def parameter_count(state: ModelState) -> int:
    """All parameters of a model, zeros counted, tied ones once."""
    return sum(math.prod(shape) for shape in Checkpoint(state).shapes().values())


def serving_dtype(state: ModelState) -> Literal["float32", "bfloat16"]:
    """The type in which a model is judged, tuned and timed: the one it is stored in, as it will be served."""
    stored = str(state.config.get("dtype") or state.config.get("torch_dtype") or "float32")
    return cast(Literal["float32", "bfloat16"], stored if stored in ("float32", "bfloat16") else "float32")


def _windows(state: ModelState, windows: Stored, role: str) -> Windows:
    return from_parquet(open_store(state.store).get(windows.key))[role]
