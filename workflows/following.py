"""Work in which linears see the pruned model's states: what the linears before them give once they are pruned.

A block's linears are pruned turn by turn. Windows halt within the block at the input of each turn, give its statistics,
and go on through what became of it: they go through each block once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.losses import NotWritten
from cluster.storage import Stored, open_store
from cluster.sums import of_worker
from workflows.models.blocks import Blocks
from workflows.models.checkpoint import read_block_file
from workflows.models.expert_names import place_of
from workflows.models.passes import Pass, halting, replace
from workflows.models.state import ModelState
from workflows.observing import Observing, inputs_of, move_on
from workflows.recipe import Recovery


@dataclass
class Halted:
    """Windows within a block, some of whose linears are pruned.

    Attributes:
        block: its number.
        turns: how many turns' statistics the windows gave.
        module: the block; it is one for all shards of a worker.
        passes: one per window.
    """

    block: int
    turns: int
    module: nn.Module
    passes: list[Pass]


@dataclass
class Shard:
    """Activations of some calibration windows.

    Attributes:
        hidden: what enters the block at hand, [1, length, width] per window.
        wanted: what the dense model gives after `dense_blocks` blocks; empty when nobody asks for it.
        halted: the same windows on their way through the block.
    """

    hidden: list[torch.Tensor]
    wanted: list[torch.Tensor]
    dense_blocks: int = 0
    halted: Halted | None = field(default=None, repr=False)


@dataclass
class PrunedStates(Observing):
    """The part of a `cluster.work.BlockWork` that moves shards; for work that changes what blocks give.

    Attributes:
        dense: the model that recovery leads back to: the one before the first stage.
        config: the model's config after the stage; differs from `before.config` for structured patterns.
        recovery: what is done to each block once its linears are pruned.
    """

    dense: ModelState
    config: dict[str, Any]
    recovery: Recovery | None

    @property
    def lookahead(self) -> int:
        """Blocks at work at once: one is written while windows go on into the next."""
        return 2 if self.flows_on else 1

    @property
    def flows_on(self) -> bool:
        """Whether a block is done with its last turn, so that windows need only go on."""
        return self.recovery is None and self.config == self.before.config

    def turns(self) -> list[list[Any]]:
        """Units whose linears read the same input together, in the order in which the block uses them.

        So whatever a linear reads comes from what is pruned already.
        """
        found: dict[str | None, list[Any]] = {}
        for unit in self.units():
            found.setdefault(unit.group and place_of(unit.group), []).append(unit)
        return list(found.values())

    @torch.no_grad()
    def open_shard(self, shard: int) -> Shard:
        """The shard's windows as they enter block 0."""
        hidden = self._entering(self._of_shard(shard))
        return Shard(hidden, list(hidden) if self.recovery else [])

    @torch.no_grad()
    def advance(self, block: int, finished: Stored | None, last: Sequence[Any], shards: Mapping[int, Shard]) -> None:
        """Replaces each window's hidden states by what the block makes of them, from where they are within it.

        Raises:
            NotWritten: they are not within it, and it is not written yet.
        """
        halted = self._halted(block, len(self._turns), shards) if last else []
        if halted:
            replace(halted[0].module, self._changed(block, last))
            for shard, own in zip(shards.values(), halted, strict=True):
                for window, one in enumerate(own.passes):
                    shard.hidden[window] = one.finish()
        elif finished is None:
            raise NotWritten(f"block {block}")
        else:
            tensors = read_block_file(open_store(self.before.store), finished.key, self.before.prefix(block))
            module = self._finished_decoder.block_of(block, tensors)
            for shard in shards.values():
                move_on(self._finished_decoder, block, module, shard.hidden)
        self._want(block, shards)

    @torch.no_grad()
    def _want(self, block: int, shards: Mapping[int, Shard]) -> None:
        """Moves what is wanted to the dense block's outputs, unless it is there already."""
        behind = [shard for shard in shards.values() if shard.wanted and shard.dense_blocks == block]
        if not behind:
            return
        module = self._dense_decoder.block(block)
        for shard in behind:
            move_on(self._dense_decoder, block, module, shard.wanted)
            shard.dense_blocks += 1

    @torch.no_grad()
    def statistics(
        self, block: int, shards: Mapping[int, Shard], groups: Sequence[str], solved: Sequence[Sequence[Any]] = ()
    ) -> Iterator[np.ndarray]:
        """Grams [in, in] fp32 (or their diagonals [in]), branch by branch and group by group.

        Windows go on from where the turn before left them, or through the whole block if this process does not hold
        them there.
        """
        halted = self._halted(block, len(solved), shards)
        if halted:
            replace(halted[0].module, self._changed(block, solved[-1]))
        else:
            halted = self._begun(block, shards)
            for results in solved:
                replace(halted[0].module, self._changed(block, results))
        yield from inputs_of(
            halted[0].module,
            {shard: one.passes for shard, one in zip(shards, halted, strict=True)},
            of_worker(shards, self.shard_count),
            groups,
            self._choices,
            weights=self._weights(block, shards),
            only_diagonal=self._only_diagonal,
        )
        last = len(solved) + 1 == len(self._turns)
        if last:
            self._decoder.read_ahead(block + 1)  # now that Grams are gone, and while the last linears are solved
        if self.flows_on or not last:
            for shard, one in zip(shards.values(), halted, strict=True):
                one.turns = len(solved) + 1
                shard.halted = one

    def _begun(self, block: int, shards: Mapping[int, Shard]) -> list[Halted]:
        """All windows about to enter a block."""
        module = halting(self._decoder.block(block), {unit.group for unit in self.units() if unit.group})
        return [
            Halted(
                block, 0, module, [Pass(partial(self._decoder.run, block, module, hidden)) for hidden in shard.hidden]
            )
            for shard in shards.values()
        ]

    def _halted(self, block: int, turns: int, shards: Mapping[int, Shard]) -> list[Halted]:
        """All windows, if they wait within a block after some turns; taken from their shards."""
        held = [shard.halted for shard in shards.values()]
        for shard in shards.values():
            shard.halted = None
        there = [one for one in held if one and (one.block, one.turns) == (block, turns)]
        return there if len(there) == len(held) else []

    def _changed(self, block: int, results: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The tensors of a block that results of its units change, by name."""
        raise NotImplementedError

    @cached_property
    def _turns(self) -> list[list[Any]]:
        return self.turns()

    @cached_property
    def _dense_decoder(self) -> Blocks:
        return self._decoder_for(self.dense)

    @cached_property
    def _finished_decoder(self) -> Blocks:
        return self._decoder_for(self.before.model_copy(update={"config": self.config}))
