"""What a block's linears read: Grams of their inputs, gathered while calibration windows go through the block."""

from collections.abc import Collection, Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from cluster.storage import Stored
from workflows.calibrated import Calibrated
from workflows.gradient_files import read_norms
from workflows.models.blocks import Blocks
from workflows.models.expert_names import same_kind
from workflows.models.passes import Pass
from workflows.scoring.gram import add_inputs, mirror
from workflows.scoring.shrinkage import shrink
from workflows.scoring.token_weights import token_weights, weighed


@dataclass
class Observing(Calibrated):
    """Work that looks at what a block's linears read.

    Attributes:
        norms: what a gradient pass with norms wrote (`workflows.gradient_files`), by which tokens are weighed; None:
            they all count the same.
    """

    norms: Stored | None

    def _weights(self, block: int, shards: Collection[int]) -> list[Sequence[torch.Tensor] | None]:
        """How much the tokens of each shard count in a block, for each window [length] fp32; see `inputs_of`."""
        if self.norms is None:
            return [None for _ in shards]
        weights = token_weights(read_norms(self.before.store, self.norms.key, block)).to(self.device)
        windows = weights.flatten().split([len(tokens) for tokens in self._tokens])
        return [[windows[window] for window in self._of_shard(shard)] for shard in shards]

    def units(self) -> list[Any]:
        """What is done to a block, see `cluster.work.Unit`."""
        raise NotImplementedError

    @property
    def _only_diagonal(self) -> bool:
        """Whether diagonals of Grams are enough."""
        raise NotImplementedError

    @property
    def _choices(self) -> int:
        """How often an expert of a block is chosen, over all calibration tokens; 0 for a dense model."""
        return self.token_count * int(self.before.config.get("num_experts_per_tok", 0))


@torch.no_grad()
def inputs_of(
    module: nn.Module,
    shards: Sequence[Iterable[Pass]],
    groups: Sequence[str],
    choices: int,
    *,
    weights: Sequence[Sequence[torch.Tensor] | None],
    only_diagonal: bool,
) -> Iterator[np.ndarray]:
    """Grams [in, in] fp32 of some linears' inputs (or their diagonals [in]), shard by shard and group by group.

    Of a Gram only the upper triangle; `summed` makes it whole.

    Args:
        module: a block that halts where the linears read.
        shards: each shard's windows on their way through the block; they go on until the last of the linears reads.
        groups: linears whose inputs are meant; other readers of the same inputs need no Gram of their own.
        choices: how often an expert of the block is chosen in all shards together; Grams of experts are shrunk.
        weights: how much tokens count, for each shard and window [length]; None: all the same.
        only_diagonal: whether diagonals are enough.
    """
    linears = {name: cast(nn.Linear, module.get_submodule(name)) for name in groups}
    sums = {
        name: torch.zeros((linear.in_features,) * (1 if only_diagonal else 2), device=linear.weight.device)
        for name, linear in linears.items()
    }
    for passes, own in zip(shards, weights, strict=True):
        for total in sums.values():
            total.zero_()
        for number, one in enumerate(passes):
            left = set(groups)
            while left:
                name, inputs, tokens = next(one)
                if name not in left:
                    continue
                if own is not None:
                    inputs = weighed(inputs, own[number] if tokens is None else own[number][tokens])
                if only_diagonal:
                    sums[name] += inputs.flatten(0, -2).float().square().sum(0)
                else:
                    add_inputs(sums[name], inputs)
                left.discard(name)
            del inputs  # the pass lets go of it before this loop would
        for kind in same_kind(groups):
            shrink([sums[name] for name in kind], choices)
        for name in groups:
            yield sums[name].cpu().numpy()


def summed(parts: Sequence[np.ndarray], device: str) -> torch.Tensor:
    """The sum of the shards' statistics, in shard order, as a new tensor on a device; Grams are whole then."""
    total = torch.from_numpy(parts[0].copy())
    for part in parts[1:]:
        total += torch.from_numpy(part)
    return mirror(total.to(device)) if total.ndim > 1 else total.to(device)


@torch.no_grad()
def move_on(decoder: Blocks, block: int, module: nn.Module, windows: MutableSequence[torch.Tensor]) -> None:
    """Replaces each window's hidden states by what a block makes of them."""
    for number, hidden in enumerate(windows):
        windows[number] = decoder.run(block, module, hidden)
