"""All linears of all blocks as the numerics of allocation see them, and the shares that a policy gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workflows.allocation.composite import composite
from workflows.allocation.knapsack import measured
from workflows.allocation.owl import owl
from workflows.allocation.shares import bounds, exact
from workflows.recipe import Allocation
from workflows.scored import BlockScores, LinearScores

LEVELS = 9  # that are tried, evenly over the width on both sides of the target
MIDDLE = LEVELS // 2
TRUSTS = (0, 0.25, 0.5, 0.75, 1)  # how far from the same for all to the cheapest mix


def levels_for(asked: Allocation, target: float) -> tuple[float, ...]:
    """Shares at which every linear is tried, the target in their middle; none unless the policy asks for it."""
    if not asked.tries_levels:
        return ()
    low, high = bounds(target, asked.width)
    reach = min(target - low, high - target)
    return tuple(np.linspace(target - reach, target + reach, LEVELS).tolist())


@dataclass(frozen=True)
class Units:
    """A unit is a linear; units are in the order of blocks, and in a block as they are named there.

    Attributes:
        blocks: what a scoring pass found.
        asked: the policy and its bounds.
        target: share of all weights that goes.
    """

    blocks: Sequence[BlockScores]
    asked: Allocation
    target: float

    @property
    def sizes(self) -> np.ndarray:
        """Weights of each unit."""
        return np.array([one.weights for one in self._linears])

    @property
    def levels(self) -> np.ndarray:
        """Shares at which every unit was tried."""
        return np.array(levels_for(self.asked, self.target))

    def shares(self, mix: Sequence[int]) -> list[dict[str, float]]:
        """Share of each linear by name, one dict per block; together they meet the target.

        What is zero already stays zero, and a linear that lost more than its share in an earlier stage keeps to that.

        Args:
            mix: a level for every unit, for policies that try levels; else empty.

        Raises:
            ValueError: scores that cannot be used.
        """
        low, high = bounds(self.target, self.asked.width)
        zeros = np.array([one.zeros / one.weights for one in self._linears])
        least = np.maximum(low, zeros)
        return self.by_block(exact(self._wanted(mix), self.sizes, self.target, least, np.maximum(high, least)).tolist())

    def mixes(self, alone: Sequence[float]) -> list[np.ndarray]:
        """Levels [units] of mixes on the way from the same for all to the one with the lowest expected cost.

        Costs of linears come from the loss's second order; a block's are scaled together, so that at the middle level
        they amount to what pruning the block alone was seen to do. They say which linears bear more, but expected costs
        add up and real ones compound: the cheapest mix leans too far.

        Args:
            alone: divergence of the model with one block alone at the middle level, for each block.
        """
        expected = [sum(one.costs[MIDDLE] for one in block.linears.values()) for block in self.blocks]
        factors = [seen / guess if guess else 0.0 for seen, guess in zip(alone, expected, strict=True)]
        costs = [
            np.multiply(one.costs, factor)
            for block, factor in zip(self.blocks, factors, strict=True)
            for one in block.linears.values()
        ]
        cheapest = measured(np.array(costs), self.levels, self.sizes, self.target)[1]
        return [np.rint(MIDDLE + trust * (cheapest - MIDDLE)).astype(np.int64) for trust in TRUSTS]

    def by_block(self, values: Sequence[Any]) -> list[dict[str, Any]]:
        """One value for each unit, as dicts by linear, one per block."""
        left = iter(values)
        return [{name: next(left) for name in block.linears} for block in self.blocks]

    def _wanted(self, mix: Sequence[int]) -> np.ndarray:
        if self.asked.policy == "owl":
            outliers = np.array([block.outliers for block in self.blocks for _ in block.linears])
            return owl(outliers, self.sizes, self.target, self.asked.width)
        if self.asked.policy == "composite":
            curves = np.array([one.curve for one in self._linears])
            return composite(curves, self.sizes, self.target, self.asked.width)
        return self.levels[list(mix)]

    @property
    def _linears(self) -> list[LinearScores]:
        return [one for block in self.blocks for one in block.linears.values()]
