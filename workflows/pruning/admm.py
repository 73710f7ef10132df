"""ADMM (ALPS, Meng et al. 2024): the mask and the weights are found together, by a splitting with a rising penalty.

In the column-normalised space (W·s with s = √diag H, so that H has a unit diagonal) it alternates

    W ← argmin tr((W - W₀) H (W - W₀)ᵀ) + ρ ‖W - D + V/ρ‖²,  that is  (W₀H - V + ρD)(H + ρI)⁻¹
    D ← the largest entries of P = W + V/ρ that the pattern allows
    V ← V + ρ (W - D)

with ρ rising from values at which the mask still moves to values at which it is settled, and refits the survivors.
D is what P keeps, and V is ρ times what P does not keep: so P and a mask are all that a turn hands on.

ρ rises in every turn, but only few inverses are made. With an anchor σ near ρ, the first line's equation is
W (H + σI) = W₀H - V + ρD + (σ - ρ) W; with the last turn's W on the right, one product with (H + σI)⁻¹ is a step
toward its solution. That ends where the exact steps end (the error within 0.5 % of theirs on a real model's Grams),
for a third of the price of an eigendecomposition. The rise is fixed: asking how much the mask has moved would hold
up a GPU in every turn.
"""

from typing import Final

import torch
from torch import Tensor

from workflows.pruning.patterns import keep_mask_by_count, nearly_kept, parse, pruned_count
from workflows.pruning.refit import refit
from workflows.scoring.gram import damped, full_precision, with_rising_damping

TURNS = 20
PENALTIES = tuple(0.1 * 30 ** (turn / (TURNS - 1)) for turn in range(TURNS))  # 0.1 … 3, of the normalised diagonal
ANCHORS = (0.3, 1.5)
REFIT_STEPS = 12


class Admm:
    """Mask and repair at once; see `solvers.Solver`."""

    statistic: Final = "gram"

    @full_precision()
    def prepare(self, statistic: Tensor, damping: float) -> tuple[Tensor, ...]:
        """Scales s [in], 0 for dead inputs; normalised H [in, in]; (H + σI)⁻¹ of every anchor [anchors, in, in]."""

        def attempt(tried: float) -> tuple[Tensor, ...] | None:
            hessian = damped(statistic, tried)
            scales = hessian.diagonal().sqrt()
            hessian /= scales
            hessian /= scales[:, None]
            inverses = hessian.new_empty(len(ANCHORS), *hessian.shape)
            for anchor, shifted in zip(ANCHORS, inverses, strict=True):
                shifted.copy_(hessian).diagonal().add_(anchor)
                factor, failed = torch.linalg.cholesky_ex(shifted)
                if failed.item():
                    return None
                torch.cholesky_inverse(factor, out=shifted)
            return scales.masked_fill(statistic.diagonal() == 0, 0), hessian, inverses

        return with_rising_damping(attempt, damping)

    @full_precision()
    def solve(self, weight: Tensor, prepared: tuple[Tensor, ...], pattern: str, sparsity: float) -> Tensor:
        """Pruned and repaired rows [rows, in].

        Zeros of an earlier stage and weights of dead inputs are zero in the result even where they are more than the
        count asks for.
        """
        scales, hessian, inverses = prepared
        group, count = parse(pattern), pruned_count(len(weight), weight.shape[1], sparsity, pattern)
        dense = weight * scales
        was_zero = dense == 0
        target = dense @ hessian
        if not torch.isfinite(target).all():
            raise ValueError("the weights or the calibration inputs hold NaN or infinity")

        free = point = dense
        before = 0.0
        for penalty in PENALTIES:
            keep = nearly_kept(point.abs().masked_fill_(was_zero, 0), group, count)
            nearer = int(penalty**2 > ANCHORS[0] * ANCHORS[1])  # on the scale on which ρ rises evenly
            dropped = point.masked_fill(keep, 0)
            wanted = torch.add(target, point, alpha=penalty).add_(dropped, alpha=-penalty - before)
            free = wanted.add_(free, alpha=ANCHORS[nearer] - penalty) @ inverses[nearer]
            point = torch.add(free, dropped, alpha=before / penalty)
            before = penalty
        scores = point.abs().masked_fill_(was_zero, -1)
        sparse = point.masked_fill(was_zero | ~keep_mask_by_count(scores, group, count), 0)
        return refit(dense, sparse, hessian, REFIT_STEPS) / scales.masked_fill(scales == 0, 1)
