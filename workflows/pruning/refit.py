"""The best weights on a mask that stays: least squares, row by row, by preconditioned conjugate gradients."""

import torch
from torch import Tensor

from workflows.scoring.gram import full_precision

ENOUGH = 1e-6  # of the first residual, squared, in the preconditioner's norm


@full_precision()
def refit(dense: Tensor, pruned: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Moves the surviving weights so that the layer's output comes nearer to what it was.

    Minimises tr((W - W₀) H (W - W₀)ᵀ) over the non-zeros of each row of W. Rows are independent problems that walk
    together, so a step is one product with H. The preconditioner is H's diagonal. The error of no row ever rises:
    conjugate gradients are cut off, not turned round.

    Args:
        dense: W₀ [rows, in] fp32.
        pruned: W [rows, in] fp32, where to start; its zeros stay.
        hessian: H [in, in], positive definite.
        steps: at most so many.

    Returns:
        The refitted rows as a new tensor.
    """
    keep = (pruned != 0).to(pruned.dtype)  # products with truth values take several times longer
    scale = hessian.diagonal().reciprocal()
    weight = pruned.clone()
    residual = ((dense - pruned) @ hessian).mul_(keep)
    direction = residual * scale
    power = first = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        if bool((power <= ENOUGH * first).all()):
            break
        curved = (direction @ hessian).mul_(keep)
        length = _share(power, (direction * curved).sum(1, keepdim=True))
        weight.addcmul_(length, direction)
        residual.addcmul_(length, curved, value=-1)
        scaled = residual * scale
        before, power = power, (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(_share(power, before), direction)
    return weight


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """The share of each row, and 0 for a row that is done."""
    return torch.where(whole > 0, part / whole, 0)
