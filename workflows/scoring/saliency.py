"""The composite saliency: what the loss loses, to second order, when one weight goes and its row is repaired.

    s_oi = ½ · Γ_o · w_oi² / [H⁻¹]_ii

Optimal Brain Surgeon (Hassibi and Stork 1993) with a Kronecker-factored Fisher (Martens and Grosse 2015): the loss is
taken as quadratic around the weights, with the curvature Γ_o · H for row o. Γ_o = E[(∂L/∂y_o)²] is a mean over the
tokens over which the Gram is a sum, so s is in the units of the loss summed over these tokens.
"""

import torch
from torch import Tensor

from workflows.scoring.gram import inverse


def inverse_diagonal(gram: Tensor, damping: float) -> Tensor:
    """[H⁻¹]_ii of the damped Gram, [in] fp32; infinite for an input that was always zero, so that it counts nothing.

    Args:
        gram: [in, in] fp32.
        damping: as for `workflows.scoring.gram.inverse`.

    Raises:
        ValueError: no Gram, or not positive definite even with the last damping.
    """
    return inverse(gram, damping).diagonal().masked_fill(gram.diagonal() == 0, torch.inf)


def composite(weight: Tensor, gamma: Tensor, inverse: Tensor) -> Tensor:
    """The saliency of every weight of some rows.

    Args:
        weight: [rows, in], any floating type.
        gamma: [rows], Γ of these rows.
        inverse: [in], [H⁻¹]_ii as from `inverse_diagonal`.

    Returns:
        s [rows, in] fp32, none negative.
    """
    return weight.float().square().mul_((gamma.float() / 2)[:, None]).div_(inverse.float())
