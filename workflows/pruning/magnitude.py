"""Magnitude pruning: the smallest weights of the chunk go; no data, no repair."""

from typing import Final

from torch import Tensor

from workflows.pruning.patterns import keep_mask


class Magnitude:
    """Score |w|, compared over all rows of the chunk; see `solvers.Solver`."""

    statistic: Final = "none"

    def prepare(self, statistic: Tensor, damping: float) -> tuple[()]:
        """Needs nothing."""
        return ()

    def solve(self, weight: Tensor, prepared: tuple[Tensor, ...], pattern: str, sparsity: float) -> Tensor:
        """Rows [rows, in] without their smallest weights."""
        keep = keep_mask(weight.abs(), pattern, sparsity, per_row=False)
        return weight.masked_fill(~keep, 0)
