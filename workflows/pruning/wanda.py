"""Wanda (Sun et al. 2023): weights count as much as their inputs are loud; no repair."""

from typing import Final

import torch
from torch import Tensor

from workflows.pruning.patterns import keep_mask


class Wanda:
    """Score |w_oi| · ‖x_i‖₂, compared within each row; see `solvers.Solver`."""

    statistic: Final = "diagonal"

    def prepare(self, statistic: Tensor, damping: float) -> tuple[Tensor]:
        """Norms of the inputs [in], from the Gram's diagonal."""
        squares = statistic.diagonal() if statistic.ndim == 2 else statistic
        if not torch.isfinite(squares).all() or (squares < 0).any():
            raise ValueError("the sums of squares of the calibration inputs are negative or not finite")
        return (squares.sqrt(),)

    def solve(self, weight: Tensor, prepared: tuple[Tensor, ...], pattern: str, sparsity: float) -> Tensor:
        """Rows [rows, in], each without its least important weights."""
        (norms,) = prepared
        # Zeros come before the weights of silent inputs, which score 0 too; so counts stay exact over stages.
        scores = (weight.abs() * norms).masked_fill_(weight == 0, -1)
        return weight.masked_fill(~keep_mask(scores, pattern, sparsity, per_row=True), 0)
