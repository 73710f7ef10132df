"""What a block's linears read: Grams of their inputs, gathered while calibration windows go through the block."""

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from cluster.storage import Stored
from cluster.sums import Span, halves
from workflows.calibrated import Calibrated
from workflows.gradient_files import read_norms
from workflows.models.blocks import Blocks
from workflows.models.expert_names import same_kind
from workflows.models.passes import Pass
from workflows.scoring.gram import add_inputs, fold, unfold
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

    def _weights(self, block: int, shards: Collection[int]) -> dict[int, Sequence[torch.Tensor] | None]:
        """How much the tokens of each shard count in a block, for each window [length] fp32; see `inputs_of`."""
        if self.norms is None:
            return dict.fromkeys(shards)
        weights = token_weights(read_norms(self.before.store, self.norms.key, block)).to(self.device)
        windows = weights.flatten().split([len(tokens) for tokens in self._tokens])
        return {shard: [windows[window] for window in self._of_shard(shard)] for shard in shards}

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
    shards: Mapping[int, Iterable[Pass]],
    spans: Sequence[Span],
    groups: Sequence[str],
    choices: int,
    *,
    weights: Mapping[int, Sequence[torch.Tensor] | None],
    only_diagonal: bool,
) -> Iterator[np.ndarray]:
    """Grams of some linears' inputs, folded to [in / 2 + 1, in] fp32 (or diagonals [in]), span by span, group by group.

    `completed` makes whole Grams of them.

    Args:
        module: a block that halts where the linears read.
        shards: each shard's windows on their way through the block; they go on until the last of the linears reads.
        spans: of shards, over which to add up.
        groups: linears whose inputs are meant; other readers of the same inputs need no Gram of their own.
        choices: how often an expert of the block is chosen in all shards together; Grams of experts are shrunk.
        weights: how much tokens count, for each shard, window by window [length]; None: all the same.
        only_diagonal: whether diagonals are enough.
    """
    linears = {name: cast(nn.Linear, module.get_submodule(name)) for name in groups}
    spare: list[dict[str, torch.Tensor]] = []  # Grams are large: one that is added or handed on is filled again

    def empty() -> dict[str, torch.Tensor]:
        if spare:
            return {name: total.zero_() for name, total in spare.pop().items()}
        return {
            name: torch.zeros((linear.in_features,) * (1 if only_diagonal else 2), device=linear.weight.device)
            for name, linear in linears.items()
        }

    def of_shard(shard: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Grams, and what of them is handed on; the same in memory."""
        sums, own = empty(), weights[shard]
        for number, one in enumerate(shards[shard]):
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
        if only_diagonal:
            return sums, sums
        return sums, {name: fold(total) for name, total in sums.items()}

    def over(span: Span) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        if span[1] - span[0] == 1:
            return of_shard(span[0])
        (whole, first), (other, second) = map(over, halves(span))
        for name, total in first.items():
            total += second[name]
        spare.append(other)
        return whole, first

    for span in spans:
        whole, sums = over(span)
        for name in groups:
            yield sums[name].cpu().numpy()
        spare.append(whole)


def completed(total: np.ndarray, device: str) -> torch.Tensor:
    """Statistics of all shards on a device: a whole Gram [in, in], or a diagonal [in]."""
    found = torch.from_numpy(total).to(device)
    return unfold(found) if found.ndim > 1 else found


@torch.no_grad()
def move_on(decoder: Blocks, block: int, module: nn.Module, windows: MutableSequence[torch.Tensor]) -> None:
    """Replaces each window's hidden states by what a block makes of them."""
    for number, hidden in enumerate(windows):
        windows[number] = decoder.run(block, module, hidden)
