"""Work in which blocks see the model's own states: windows go through once, and are looked at on the way.

No block waits for what becomes of the one before, so several are at work at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from cluster.storage import Stored
from cluster.sums import of_worker
from workflows.models.passes import Pass, halting
from workflows.observing import Observing, inputs_of, move_on


@dataclass
class Passing:
    """Hidden states of a shard that enter the block at hand, and what it made of them once all were looked at."""

    hidden: list[torch.Tensor]
    after: list[torch.Tensor] | None = None


@dataclass
class OwnStates(Observing):
    """The part of a `cluster.work.BlockWork` that moves shards; for work that changes no block's inputs."""

    @property
    def lookahead(self) -> int:
        """Blocks at work at once: one is looked at, one is solved, one is written."""
        return 3

    @property
    def flows_on(self) -> bool:
        """Shards go through the model's own block, whatever becomes of it."""
        return False

    def turns(self) -> list[list[Any]]:
        """All units in one: nobody's statistics wait for what becomes of others."""
        return [self.units()]

    @torch.no_grad()
    def open_shard(self, shard: int) -> Passing:
        """The shard's windows as they enter block 0."""
        return Passing(self._entering(self._of_shard(shard)))

    def advance(self, block: int, finished: Stored | None, last: Sequence[Any], shards: Mapping[int, Passing]) -> None:
        """Moves each window through the model's own block, unless that was done when it was looked at."""
        behind = [shard for shard in shards.values() if shard.after is None]
        module = self._decoder.block(block) if behind else None
        for shard in shards.values():
            if module is not None and shard.after is None:
                move_on(self._decoder, block, module, shard.hidden)
            else:
                shard.hidden, shard.after = shard.after or [], None

    def statistics(
        self, block: int, shards: Mapping[int, Passing], groups: Sequence[str], solved: Sequence[Sequence[Any]] = ()
    ) -> Iterator[np.ndarray]:
        """Grams [in, in] fp32, or their diagonals [in] where that is enough, branch by branch and group by group."""
        module = halting(self._decoder.block(block), groups)
        self._decoder.read_ahead(block + 1)
        moved: dict[int, list[torch.Tensor]] = {number: [] for number in shards}

        def passes(hidden: Sequence[torch.Tensor], outputs: list[torch.Tensor]) -> Iterator[Pass]:
            for one in hidden:
                own = Pass(partial(self._decoder.run, block, module, one))
                yield own
                outputs.append(own.finish())

        yield from inputs_of(
            module,
            {number: passes(shards[number].hidden, outputs) for number, outputs in moved.items()},
            of_worker(shards, self.shard_count),
            groups,
            self._choices,
            weights=self._weights(block, shards),
            only_diagonal=self._only_diagonal,
        )
        for number, outputs in moved.items():
            shards[number].after = outputs
