"""Block recovery: the survivors of a block learn to give what the dense model gives at that place.

The repair of one linear looks at its own output only. Here the block as a whole, fed with what the pruned blocks
before it made, moves toward the dense model's hidden states, which also undoes some of the error that has built up.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
Tensors = dict[str, Tensor]


def distance(output: Tensor, wanted: Tensor) -> Tensor:
    """How far hidden states are from what they should be: squared, per token relative to its length; summed.

    Every token counts alike: the next norm divides by its length, and a few tokens (the first one) are much longer.

    Args:
        output: [..., width].
        wanted: [..., width].
    """
    output, wanted = output.float(), wanted.float()
    return ((output - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).sum()


def no_moment(weights: Mapping[str, Tensor]) -> Tensors:
    """Adam's first moments, and its second ones, before the first step."""
    return {name: torch.zeros_like(one) for name, one in weights.items()}


@torch.no_grad()
def descend(
    weights: Mapping[str, Tensor],
    moments: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    gradients: Sequence[Mapping[str, Tensor]],
    step: int,
    steps: int,
    learning_rate: float,
) -> tuple[Tensors, tuple[Tensors, Tensors]]:
    """One step of Adam (Kingma & Ba 2015) on the non-zeros; zeros stay.

    Its length is a share of each matrix's root mean square over non-zeros, so one rate serves all, and falls as a
    cosine over the steps.

    Args:
        weights: fp32, by name.
        moments: the first and the second ones, as `no_moment` or the last step gave them.
        gradients: of parts of the data, by name; they are added in this order.
        step: number of this step, from 0.
        steps: how many there will be.
        learning_rate: the first step's length.

    Returns:
        New weights and moments.
    """
    rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
    first, second = BETAS
    new: Tensors = {}
    means: Tensors = {}
    squares: Tensors = {}
    for name, weight in weights.items():
        gradient = gradients[0][name].float().clone()
        for other in gradients[1:]:
            gradient += other[name].float()
        alive = weight != 0
        gradient.mul_(alive)
        means[name] = torch.lerp(gradient, moments[0][name], first)
        squares[name] = torch.lerp(gradient.square_(), moments[1][name], second)
        scale = (weight.square().sum() / alive.count_nonzero().clamp_min(1)).sqrt()
        length = (squares[name] / (1 - second ** (step + 1))).sqrt_().clamp_min_(1e-30)
        new[name] = weight - (rate * scale / (1 - first ** (step + 1))) * means[name] / length
    return new, (means, squares)
