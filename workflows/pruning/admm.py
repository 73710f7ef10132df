"""ADMM (ALPS, Meng et al. 2024): the mask and the weights are found together, by a splitting with a rising penalty.

In the column-normalised space (W·s with s = √diag H, so that H has a unit diagonal) it alternates

    W ← argmin tr((W - W₀) H (W - W₀)ᵀ) + ρ ‖W - D + V/ρ‖²,  that is  (W₀H - V + ρD)(H + ρI)⁻¹
    D ← the largest entries of W + V/ρ that the pattern allows
    V ← V + ρ (W - D)

with ρ rising from values at which the mask still moves to values at which it is settled, and refits the survivors.
"""

from typing import Final

import torch
from torch import Tensor

from workflows.pruning.patterns import keep_mask_by_count, parse, pruned_count
from workflows.pruning.refit import refit
from workflows.scoring.gram import damped, full_precision

PENALTIES = (0.1, 0.3, 1.0, 3.0)  # ρ, in units of the normalised H's diagonal
TURNS = 5  # with each
REFIT_STEPS = 12


class Admm:
    """Mask and repair at once; see `solvers.Solver`."""

    statistic: Final = "gram"

    @full_precision()
    def prepare(self, statistic: Tensor, damping: float) -> tuple[Tensor, ...]:
        """Scales s [in], 0 for dead inputs; normalised H [in, in]; (H + ρI)⁻¹ of every penalty [penalties, in, in]."""
        hessian = damped(statistic, damping)
        scales = hessian.diagonal().sqrt()
        hessian /= scales
        hessian /= scales[:, None]
        inverses = torch.stack([_inverse(hessian, one) for one in PENALTIES])
        return scales.masked_fill(statistic.diagonal() == 0, 0), hessian, inverses

    @full_precision()
    def solve(self, weight: Tensor, prepared: tuple[Tensor, ...], pattern: str, sparsity: float) -> Tensor:
        """Pruned and repaired rows [rows, in].

        Zeros of an earlier stage and weights of dead inputs are zero in the result even where they are more than the
        count asks for.
        """
        scales, hessian, inverses = prepared
        if not torch.isfinite(weight).all():
            raise ValueError("the weights hold NaN or infinity")
        group, count = parse(pattern), pruned_count(len(weight), weight.shape[1], sparsity, pattern)
        dense = weight * scales
        was_zero = dense == 0
        target = dense @ hessian

        def nearest(point: Tensor) -> Tensor:
            """The nearest matrix of the pattern."""
            scores = point.abs().masked_fill_(was_zero, -1)
            return point.masked_fill(was_zero | ~keep_mask_by_count(scores, group, count), 0)

        sparse, dual = nearest(dense), torch.zeros_like(dense)
        for penalty, inverse in zip(PENALTIES, inverses, strict=True):
            for _ in range(TURNS):
                free = (target - dual).add_(sparse, alpha=penalty) @ inverse
                sparse = nearest(free + dual / penalty)
                dual.add_(free - sparse, alpha=penalty)
        return refit(dense, sparse, hessian, REFIT_STEPS) / scales.masked_fill(scales == 0, 1)


def _inverse(hessian: Tensor, penalty: float) -> Tensor:
    shifted = hessian.clone()
    shifted.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted))
