"""Pruned weights stay pruned: their gradients are zeroed before an optimizer sees them."""

import torch
from torch import nn

from cluster.errors import KarikomiError


def pruned_positions(block: nn.Module) -> dict[str, torch.Tensor]:
    """Where a block's linears are zero: parameter name → bool [out, in]; linears without zeros are left out."""
    zeros = {
        f"{name}.weight": linear.weight.detach() == 0
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    }
    return {name: positions for name, positions in zeros.items() if positions.any()}


def hold(block: nn.Module, positions: dict[str, torch.Tensor]) -> None:
    """Zeroes the gradients of pruned weights as they arise, before any reduction, sharding or accumulation.

    With a gradient that is always zero, Adam's moments stay zero, weight decay multiplies zero, and so a pruned weight
    is exactly zero after every step – in the 16-bit copy and in the fp32 master alike.
    """
    for name, parameter in block.named_parameters():
        if name in positions:
            parameter.register_hook(lambda gradient, pruned=positions[name]: gradient.masked_fill(pruned, 0))


def verify(tensors: dict[str, torch.Tensor], positions: dict[str, torch.Tensor], block: int) -> None:
    """Checks, position by position, that what was pruned is still exactly zero.

    Raises:
        KarikomiError: it is not; names the block and the tensor.
    """
    for name, pruned in positions.items():
        if revived := int((tensors[name][pruned] != 0).sum()):
            raise KarikomiError(
                f"tune: block {block}: {name}: {revived} pruned weights came back",
                "Nothing was written. This is a fault of karikomi's, not of the job: please report it.",
            )
