"""What the engines are handed: work on the blocks of a model, over shards. They know nothing of pruning."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from cluster.storage import Stored


class Unit(Protocol):
    """A piece of a block that is solved alone."""

    @property
    def group(self) -> str | None:
        """The input whose statistics it needs; None: it needs none."""


class ShardedWork(Protocol):
    """Something done to a model's blocks over shards. Travels to every worker, so it is small and picklable."""

    @property
    def block_count(self) -> int:
        """Blocks of the model."""

    @property
    def shard_count(self) -> int:
        """Calibration shards."""

    def setup(self) -> None:
        """Called once in every process (threads, device)."""


class BlockWork(ShardedWork, Protocol):
    """What is done to a block."""

    @property
    def lookahead(self) -> int:
        """Blocks that may be at work at once; more than one only if `advance` can do without the finished block."""

    @property
    def flows_on(self) -> bool:
        """Whether shards wait within a block for its last results, and go on through them."""

    @property
    def rounds(self) -> int:
        """How often workers look at a block's result to make it better, before it is written."""

    def turns(self) -> Sequence[Sequence[Unit]]:
        """The units of one block, turn by turn: statistics see what the turns before have made of the block."""

    def open_shard(self, shard: int) -> Any:
        """Activations that enter block 0."""

    def advance(self, block: int, finished: Stored | None, last: Sequence[Any], shards: Mapping[int, Any]) -> None:
        """Moves activations through a block, in place.

        Args:
            block: which one.
            finished: its file; None while it is not written.
            last: results of its last turn, if they are at hand; only for work that flows on.
            shards: their activations.

        Raises:
            NotWritten: the file is needed.
        """

    def statistics(
        self, block: int, shards: Mapping[int, Any], groups: Sequence[str], solved: Sequence[Sequence[Any]]
    ) -> Iterator[np.ndarray]:
        """Yields sums over shards: branch by branch of those that lie in `shards`, and for each group by group.

        `solved` are the turns' results before; branches are those of `cluster.sums`.
        """

    def prepare(self, group: str, total: np.ndarray) -> Any:
        """Makes of the sum over all shards, which it may change, what `solve` needs."""

    def solve(self, block: int, unit: Any, prepared: Any) -> Any:
        """Solves one unit."""

    def assemble(self, block: int, refined: Any | None, results: Sequence[Any]) -> Stored:
        """Puts the units' results together, or takes what the rounds made of them, and writes the block."""


class RoundedWork(BlockWork, Protocol):
    """What is done to a block in rounds, by work that has some."""

    def begin(self, block: int, results: Sequence[Any]) -> tuple[Any, Any]:
        """Puts the units' results together for the rounds: what workers see, and what only `refine` does."""

    def look(self, block: int, number: int, seen: Any, shards: Mapping[int, Any]) -> Iterator[Any]:
        """Yields shard by shard what round `number` finds."""

    def refine(self, block: int, number: int, seen: Any, kept: Any, parts: Sequence[Any]) -> tuple[Any, Any]:
        """One round's step: both of `begin`, anew."""
