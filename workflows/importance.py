"""What the rest of a model makes of each linear's outputs: Γ, from one backward pass streamed block by block.

    Γ_o = E[(∂L/∂y_o)²]   mean over all calibration tokens (windows x length), [out] fp32, per linear

L is the sum over all predicted tokens of the next-token cross-entropy, in nats (`workflows.scoring.gradients`); of a
classifier, the sum over all sentences of the cross-entropy of their classes. So,
with the Gram a plain sum over the same tokens, ½ · Γ_o · w_oi² / [H⁻¹]_ii is the increase of the summed loss over the
calibration tokens; divided by the number of predicted tokens it is nats per token. The last token of a window
predicts nothing and has zero gradients; it is counted in the mean as it is counted in the Gram. The tokens that
should follow are those of the text, so this is the empirical Fisher.

On request the norm of each token's gradient at the end of each block is kept as well: ‖∂L/∂h_t‖ [tokens].
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cluster.backwards import run_backwards
from cluster.errors import InputError
from cluster.spec import ClusterSpec
from cluster.storage import Stored
from workflows.boundaries import Boundaries
from workflows.calibrated import Calibrated, as_asked
from workflows.gradient_files import Importance
from workflows.models.experts import prunable
from workflows.models.state import ModelState
from workflows.recipe import Recipe
from workflows.scoring.gradients import block_backward
from workflows.scoring.token_weights import token_weights

GIB = 1 << 30
LOSS = "loss"
NORMS = "norms"  # beside the names of linears, of which none is so


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
        norms: whether to keep the norm of each token's gradient.
    """

    memory: int
    norms: bool = False

    @torch.no_grad()
    def begin(self, shards: Sequence[int]) -> Held:
        """Hidden states that enter block 0."""
        return Held(Boundaries(self.memory), {shard: self._entering(self._of_shard(shard)) for shard in shards})

    @torch.no_grad()
    def forward(self, block: int, held: Held) -> None:
        """Keeps what enters the block, and moves it through."""
        module = self._decoder.block(block)
        self._decoder.read_ahead(min(block + 1, self.block_count - 1))  # the way back begins with the last one
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
        """Moves gradients back through the block.

        Per shard and linear the sum over tokens of (∂L/∂y_o)²; where asked the norms of what came, [tokens].
        """
        module = self._decoder.block(block)
        self._decoder.read_ahead(block - 1)
        linears = prunable(module)
        sums = []
        with self._repeatable():
            for shard, gradients in held.current.items():
                total = {name: torch.zeros(one.out_features, device=self.device) for name, one in linears.items()}
                if self.norms:
                    total[NORMS] = torch.cat([one.float().norm(dim=-1).flatten() for one in gradients])
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
        """Sums the shards' results in shard order; norms stand one after the other."""
        summed = {name: one.copy() for name, one in parts[0].items() if name != NORMS}
        for part in parts[1:]:
            for name in summed:
                summed[name] += part[name]
        if NORMS in parts[0]:
            summed[NORMS] = np.concatenate([part[NORMS] for part in parts])
        return summed

    def result(self, turned: Mapping[str, np.ndarray], blocks: Sequence[Mapping[str, np.ndarray]]) -> Importance:
        """Sums become means.

        Args:
            turned: total of `turn`.
            blocks: totals of `backward`, from block 0 on.
        """
        gammas = tuple(
            {name: torch.from_numpy(one) / self.token_count for name, one in block.items() if name != NORMS}
            for block in blocks
        )
        norms = tuple(torch.from_numpy(block[NORMS]) for block in blocks if NORMS in block)
        return Importance(float(turned[LOSS]), self.token_count, gammas, norms)

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
        recipe: gives shards, type, device and threads, and whether tokens are weighed.
        cluster: how many workers, and how much each keeps in memory.
        on_step: told how many of how many steps are done; every block is two, one each way.
        stop: asked between steps and while waiting for machines.

    Raises:
        Cancelled: `stop` said so; nothing of the pass is kept.
        Unavailable: no machines within the time, or one gang after another was lost.
        InputError: norms by which no tokens can be weighed.
    """
    work = GradientPass(
        **as_asked(recipe, before, windows),
        memory=int(cluster.spill_above_gib * GIB),
        norms=recipe.weighs_tokens,
    )
    found = work.result(*run_backwards(work, cluster, recipe.threads, on_step, stop))
    check_norms(found)
    return found


def check_norms(found: Importance) -> None:
    """Whether tokens can be weighed by what a pass found, before blocks are pruned by it.

    Raises:
        InputError: in some block they cannot.
    """
    for block, norms in enumerate(found.norms):
        try:
            token_weights(norms)
        except ValueError as error:
            raise InputError(
                f"token_weights: gradient cannot be had at the end of block {block}: {error}",
                "Look at data.calibration, run blocks in float32, or write token_weights: equal.",
            ) from error
