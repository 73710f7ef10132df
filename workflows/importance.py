"""What the rest of a model makes of each linear's outputs: Γ, from one backward pass streamed block by block.

    Γ_o = E[(∂L/∂y_o)²]   mean over all calibration tokens (windows x length), [out] fp32, per linear

L is the sum over all predicted tokens of the next-token cross-entropy, in nats (`workflows.scoring.gradients`); of a
classifier, the sum over all sentences of the cross-entropy of their classes. So,
with the Gram a plain sum over the same tokens, ½ · Γ_o · w_oi² / [H⁻¹]_ii is the increase of the summed loss over the
calibration tokens; divided by the number of predicted tokens it is nats per token. The last token of a window
predicts nothing and has zero gradients; it is counted in the mean as it is counted in the Gram. The tokens that
should follow are those of the text, so this is the empirical Fisher.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cluster.backwards import run_backwards
from cluster.spec import ClusterSpec
from cluster.storage import Store, Stored
from workflows.boundaries import Boundaries
from workflows.calibrated import Calibrated, as_asked
from workflows.models.checkpoint import as_tensor, header
from workflows.models.experts import prunable
from workflows.models.state import ModelState
from workflows.recipe import Recipe
from workflows.scoring.gradients import block_backward

GIB = 1 << 30
LOSS = "loss"
GAMMAS = "model.layers."  # before a block's number, in the file of every family


@dataclass(frozen=True)
class Importance:
    """The result of a gradient pass.

    Attributes:
        loss: summed over the calibration windows, in nats.
        tokens: calibration tokens, over which Γ is a mean; of each window one is not predicted.
        gammas: one dict per block, linear → Γ [out] fp32.
    """

    loss: float
    tokens: int
    gammas: tuple[dict[str, torch.Tensor], ...]


@dataclass
class Held:
    """What a worker holds between two steps: of each shard one tensor [1, length, width] per window.

    Attributes:
        boundaries: what enters each block.
        current: on the way forward the hidden states, on the way back ∂L/∂(hidden states) at the border at hand.
    """

    boundaries: Boundaries
    current: dict[int, list[torch.Tensor]]


@dataclass
class GradientPass(Calibrated):
    """The work of a backward pass over the blocks of a model; see `cluster.backwards.BackwardWork`.

    Attributes:
        memory: bytes of boundary activations that a worker keeps in memory; does not change bits.
    """

    memory: int

    @torch.no_grad()
    def begin(self, shards: Sequence[int]) -> Held:
        """Hidden states that enter block 0."""
        return Held(Boundaries(self.memory), {shard: self._entering(shard) for shard in shards})

    @torch.no_grad()
    def forward(self, block: int, held: Held) -> None:
        """Keeps what enters the block, and moves it through."""
        module = self._decoder.block(block)
        for shard, windows in held.current.items():
            held.boundaries.keep(block, shard, windows)
            held.current[shard] = [self._decoder.run(block, module, hidden) for hidden in windows]

    def turn(self, held: Held) -> list[dict[str, np.ndarray]]:
        """From the last hidden states to their gradients; gives the loss of each shard."""
        head = self._decoder.head()
        losses = []
        for shard, windows in held.current.items():
            total = np.zeros((), dtype=np.float64)
            for number, window in enumerate(self._of_shard(shard)):
                loss, windows[number] = head.loss(windows[number], self._wanted(window))
                total += loss
            losses.append({LOSS: total})
        return losses

    def backward(self, block: int, held: Held) -> list[dict[str, np.ndarray]]:
        """Moves gradients back through the block; per shard and linear the sum over tokens of (∂L/∂y_o)²."""
        module = self._decoder.block(block)
        linears = prunable(module)
        sums = []
        with self._repeatable():
            for shard, gradients in held.current.items():
                total = {name: torch.zeros(one.out_features, device=self.device) for name, one in linears.items()}
                for number, hidden in enumerate(held.boundaries.windows(block, shard)):
                    gradients[number], squares = block_backward(
                        lambda states: self._decoder.run(block, module, states),
                        linears,
                        hidden.to(self.device),
                        gradients[number],
                    )
                    for name, own in squares.items():
                        total[name] += own
                sums.append({name: one.cpu().numpy() for name, one in total.items()})
        held.boundaries.drop(block)
        return sums

    def total(self, parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Sums the shards' results in shard order."""
        summed = {name: one.copy() for name, one in parts[0].items()}
        for part in parts[1:]:
            for name, one in part.items():
                summed[name] += one
        return summed

    def result(self, turned: Mapping[str, np.ndarray], blocks: Sequence[Mapping[str, np.ndarray]]) -> Importance:
        """Sums become means.

        Args:
            turned: total of `turn`.
            blocks: totals of `backward`, from block 0 on.
        """
        gammas = tuple(
            {name: torch.from_numpy(one) / self.token_count for name, one in block.items()} for block in blocks
        )
        return Importance(float(turned[LOSS]), self.token_count, gammas)

    def _repeatable(self) -> AbstractContextManager[Any]:
        """The fused attention kernels of GPUs sum gradients in whatever order their threads come; plain ones do not."""
        return sdpa_kernel(SDPBackend.MATH) if self.device == "cuda" else nullcontext()


def measure_importance(
    before: ModelState,
    windows: Stored,
    recipe: Recipe,
    cluster: ClusterSpec,
    on_step: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> Importance:
    """Γ of every linear of a model, over the recipe's calibration windows, on a Ray cluster.

    Args:
        before: the model; its blocks as they are now.
        windows: the windows of all roles in the run's store.
        recipe: gives shards, type, device and threads.
        cluster: how many workers, and how much each keeps in memory.
        on_step: told how many of how many steps are done; every block is two, one each way.
        stop: asked between steps and while waiting for machines.

    Raises:
        Cancelled: `stop` said so; nothing of the pass is kept.
        Unavailable: no machines within the time, or one gang after another was lost.
    """
    work = GradientPass(
        **as_asked(recipe, before, windows),
        memory=int(cluster.spill_above_gib * GIB),
    )
    return work.result(*run_backwards(work, cluster, recipe.threads, on_step, stop))


def put_gammas(store: Store, key: str, importance: Importance) -> Stored:
    """Writes every Γ as safetensors, under the linears' full names; small, [out] numbers per linear."""
    tensors = {
        f"{GAMMAS}{block}.{name}": gamma
        for block, gammas in enumerate(importance.gammas)
        for name, gamma in sorted(gammas.items())
    }
    about = {"tokens": str(importance.tokens), "loss": repr(importance.loss)}
    return store.put(key, safetensors.torch.save(tensors, metadata=about))


def read_gammas(store: Store, key: str, block: int) -> dict[str, torch.Tensor]:
    """Γ of one block's linears, by name; only their bytes are read."""
    prefix = f"{GAMMAS}{block}."
    return {
        name.removeprefix(prefix): as_tensor(store.read(key, info.start, info.end - info.start), info, info.shape)
        for name, info in header(store, key).items()
        if name.startswith(prefix)
    }
