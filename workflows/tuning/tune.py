"""Tuning between stages: the surviving weights of the blocks, repaired with DeepSpeed, sharded over ranks.

Only blocks are tuned. Embeddings, final norm and head stay the source's: in a small model they are most of the
parameters, and a block file is all that a stage writes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch.nn.utils.rnn import pad_sequence

from cluster.errors import KarikomiError
from cluster.storage import Stored, open_store
from cluster.training import train
from workflows.data.windows import Windows, from_parquet
from workflows.models.checkpoint import Checkpoint, block_file
from workflows.models.state import ModelState
from workflows.models.whole import layers_of, load_model
from workflows.recipe import Tune
from workflows.tuning import masks
from workflows.tuning.objective import ClassObjective, Objective

GRADIENT_NORM = 1.0


class StepLosses(BaseModel):
    """Rank 0's losses at one optimizer step, in nats per token, or per text.

    `language_model` is the task's own loss; of a classifier, the cross entropy of its classes.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    total: float
    language_model: float
    distillation: float


class Tuned(BaseModel):
    """The tuned blocks and how the losses went."""

    model_config = ConfigDict(frozen=True)

    blocks: tuple[Stored, ...]
    losses: tuple[StepLosses, ...]


@dataclass(frozen=True)
class TuneWork:
    """All that a rank needs to know; travels to the ranks, so it holds names of objects and no tensors."""

    student: ModelState
    teacher: ModelState
    windows_key: str
    tune: Tune
    steps: int
    key_prefix: str
    dtype: Literal["float32", "bfloat16"]
    device: str
    threads: int
    seed: int


def tune(
    work: TuneWork,
    on_step: Callable[[int, int, dict[str, float]], None],
    stop: Callable[[], bool],
    loop: Callable[[Any, Any], None] | None = None,
) -> Tuned:
    """Tunes a model on `work.tune.ranks` ranks.

    Args:
        work: what is tuned, on what, how long.
        on_step: told step, steps and rank 0's losses.
        stop: asked while it goes on.
        loop: what every rank runs, `tune_rank` if not given.

    Raises:
        Unavailable, Cancelled: see `cluster.training.train`.
        KarikomiError: a pruned weight came back, or the loss is not finite.
    """

    def on_news(news: dict[str, Any]) -> None:
        if "step" in news:
            on_step(news["step"], work.steps, {"loss": news["total"], "kl": news["distillation"]})

    gpus = 1 if work.device == "cuda" else 0
    found = train(loop or tune_rank, work, work.tune.ranks, work.threads, gpus, on_news, stop)
    assert found is not None, "rank 0 ended without a result"
    return Tuned.model_validate(found)


def tune_rank(work: TuneWork, board: Any) -> None:
    """One rank's part; rank 0 writes the blocks and gives the result to the board."""
    import deepspeed
    import ray
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    # On a CPU DeepSpeed would compile a reduction through shared memory of its own. It would need a compiler, leave a
    # lock behind when it is killed while compiling, and give other bits on one machine than on two. Gloo does neither.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    torch.set_num_threads(work.threads)
    torch.manual_seed(work.seed)
    if work.device == "cuda":  # on a CPU every operation that is used here is deterministic anyway
        torch.use_deterministic_algorithms(True, warn_only=True)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = getattr(torch, work.dtype)
    teacher = load_model(work.teacher, dtype).to(work.device)
    student = load_model(work.student, dtype)
    layers = list(layers_of(student, work.student.config))
    positions = [masks.pruned_positions(layer) for layer in layers]
    for layer, pruned in zip(layers, positions, strict=True):
        layer.requires_grad_(True)
        masks.hold(layer, {name: one.to(work.device) for name, one in pruned.items()})
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # torch's AdamW: nothing to compile, and the same on every machine.
    optimizer = torch.optim.AdamW(
        trained, lr=work.tune.learning_rate, weight_decay=work.tune.weight_decay, foreach=False
    )
    windows = from_parquet(open_store(work.student.store).get(work.windows_key))["tuning"]
    kind = Objective if windows.labels is None else ClassObjective
    objective = kind(student, teacher, work.tune.distill_weight if work.tune.distill else 0.0)
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=deepspeed_config(work), dist_init_required=False
    )
    losses: list[StepLosses] = []
    for step, chosen in enumerate(batches(len(windows.tokens), work.tune.batch, work.steps, ranks, rank, work.seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, work.steps, work.tune)
        parts = engine(*(one.to(work.device) for one in batch_of(windows, chosen, work.student.config)))
        engine.backward(parts[0])
        engine.step()
        total, lm, kl = parts.detach().tolist()
        if not math.isfinite(total):
            raise KarikomiError(
                f"tune: the loss is {total} at step {step} of {work.steps}",
                f"Lower tune.learning_rate (it is {work.tune.learning_rate:g}) or raise tune.warmup, and run it again.",
            )
        losses.append(StepLosses(step=step, total=total, language_model=lm, distillation=kl))
        asked = ray.get(board.note.remote(**losses[-1].model_dump())) if rank == 0 else False
        if everywhere(asked, work.device):
            return
    blocks = list(save(engine, layers, positions, work, rank))
    if rank == 0:
        result = Tuned(blocks=tuple(blocks), losses=tuple(losses))
        ray.get(board.finish.remote(result.model_dump()))


def save(
    engine: Any, layers: list[Any], positions: list[dict[str, torch.Tensor]], work: TuneWork, rank: int
) -> Iterator[Stored]:
    """Brings the shards of one block at a time together, checks its zeros and writes it (on rank 0)."""
    import deepspeed

    store, checkpoint = open_store(work.student.store), Checkpoint(work.student)
    for number, layer in enumerate(layers):
        sharded = work.tune.zero == 3
        parameters = list(layer.parameters())
        with deepspeed.zero.GatheredParameters(parameters) if sharded else nullcontext():
            if rank == 0:
                kinds = {name: tensor.dtype for name, tensor in checkpoint.read_block(number)}
                tensors = {name: one.detach().to("cpu", kinds[name]) for name, one in layer.named_parameters()}
                assert tensors.keys() == kinds.keys(), tensors.keys() ^ kinds.keys()
                masks.verify(tensors, positions[number], number)
                yield store.put(
                    f"{work.key_prefix}/{number:05d}.safetensors", block_file(work.student.prefix(number), tensors)
                )
    del engine


def batch_of(windows: Windows, chosen: np.ndarray, config: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What the objective is given: tokens [windows, length] int64; of labelled texts also their mask and labels.

    Texts are padded to the longest one of the batch.
    """
    rows = [torch.from_numpy(windows.tokens[one].astype(np.int64)) for one in chosen]
    if windows.labels is None:
        return (torch.stack(rows),)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    tokens = pad_sequence(rows, batch_first=True, padding_value=config.get("pad_token_id") or 0)
    return tokens, mask, torch.tensor([windows.labels[one] for one in chosen])


def batches(windows: int, batch: int, steps: int, ranks: int, rank: int, seed: int) -> Iterator[np.ndarray]:
    """Which windows a rank takes at each step: a function of seed, step and rank alone. [batch] int64.

    Every epoch is a new permutation. A file of token windows is small beside its model, so each rank reads it whole
    instead of streaming it; what matters is that the order never depends on timing.
    """
    random = np.random.default_rng(seed)
    queue = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(queue) < batch * ranks:
            queue = np.concatenate([queue, random.permutation(windows)])
        taken, queue = queue[: batch * ranks], queue[batch * ranks :]
        yield taken[rank * batch : (rank + 1) * batch]


def learning_rate(step: int, steps: int, tune: Tune) -> float:
    """Rises linearly over the warm-up, then falls as half a cosine to a tenth; `step` counts from 1."""
    warm = max(1, round(steps * tune.warmup))
    if step <= warm:
        return tune.learning_rate * step / warm
    done = (step - warm) / max(1, steps - warm)
    return tune.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def everywhere(asked: bool, device: str) -> bool:
    """Rank 0's answer, on all ranks."""
    flag = torch.tensor([int(asked)], device=device)
    torch.distributed.broadcast(flag, 0)
    return bool(flag.item())


def deepspeed_config(work: TuneWork) -> dict[str, Any]:
    """DeepSpeed's configuration: precision, ZeRO stage, clipping; everything else is its default."""
    return {
        "train_micro_batch_size_per_gpu": work.tune.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": GRADIENT_NORM,
        "bf16": {"enabled": work.dtype == "bfloat16"},
        "zero_optimization": {"stage": work.tune.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
