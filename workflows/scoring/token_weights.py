"""How much each calibration token counts, by what the loss makes of it: ω_t, from the gradient at the block's output.

A Gram G = Σ_t ω_t x_t x_tᵀ makes a solver spare the tokens on which the loss rests. To second order, and if directions
did not matter, an error on token t would cost ‖∂L/∂h_t‖² times its squared length. But a few tokens have most of these
squares, so that the Gram of some thousands would rest on some hundreds and miss directions. ω_t ~ ‖∂L/∂h_t‖ is the
compromise: it is bounded by the square root of the range, and leaves half of the tokens' weight and more (measured as
(Σω)² / Σω² over their number).
"""

import torch
from torch import Tensor


def token_weights(norms: Tensor) -> Tensor:
    """ω of all calibration tokens in one block, with mean 1, so that whatever is made of a Gram keeps its scale.

    Args:
        norms: ‖∂L/∂h_t‖ at the end of the block, [tokens].

    Returns:
        [tokens] fp32. A token without a gradient has weight 0: the loss does not depend on it.

    Raises:
        ValueError: a norm is not finite, or all are zero.
    """
    if not torch.isfinite(norms).all():
        raise ValueError("gradients of the loss are not finite")
    if not norms.any():
        raise ValueError("all gradients of the loss are zero: it depends on no token")
    exact = norms.double()
    return (exact / exact.mean()).float()


def weighed(x: Tensor, weights: Tensor) -> Tensor:
    """Inputs times √ω, so that their Gram is Σ_t ω_t x_t x_tᵀ.

    Args:
        x: [..., in], any floating type; leading dimensions are tokens.
        weights: ω of these tokens, one for each.

    Returns:
        [tokens, in] fp32, a new tensor.
    """
    return x.detach().flatten(0, -2).float() * weights.flatten().sqrt()[:, None]
