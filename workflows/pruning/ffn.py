"""Structured removal: whole channels of the gated MLP, chosen and repaired through its output projection.

Optimal Brain Surgeon (Hassibi & Stork 1993) on input columns of W: dropping the columns S costs
Σ_i w_iS ([H⁻¹]_SS)⁻¹ w_iSᵀ, and the other columns repair it best by W -= W_S ([H⁻¹]_SS)⁻¹ [H⁻¹]_S:.
"""

import math

import torch
from torch import Tensor

from workflows.scoring.gram import full_precision, inverse, with_rising_damping

# DESIGN §6: the target is met within 0.1 point.
SHARE_TOLERANCE = 0.001


def keep_count(channels: int, sparsity: float) -> int:
    """Channels that stay, so that the share removed is the one asked for.

    Args:
        channels: channels of the dense MLP.
        sparsity: share to remove.

    Raises:
        ValueError: whole channels do not meet the share within 0.1 point, or none would stay; the message
            names the nearest share that can be met.
    """
    removed = math.floor(channels * sparsity + 0.5)
    if channels - removed >= 1 and abs(removed / channels - sparsity) <= SHARE_TOLERANCE + 1e-12:
        return channels - removed
    nearest = min(removed, channels - 1) / channels
    raise ValueError(
        f"sparsity {sparsity:g} cannot be met by whole channels of {channels}; the nearest that can is {nearest:.6g}"
    )


@full_precision()
def remove_channels(down: Tensor, gram: Tensor, keep: int, damping: float, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Removes the cheapest input channels of the output projection and repairs the rest.

    A channel costs Σ_i w_ij² / [H⁻¹]_jj; the `batch` cheapest go at a time, with their joint repair, and all
    that are left are scored again. Channels that were never active cost nothing and go first.

    Args:
        down: [out, channels] fp32, left as it is.
        gram: [channels, channels] fp32, Gram of the projection's inputs.
        keep: number of channels that stay.
        damping: λ as a share of the Gram's mean diagonal; raised ×10 with a warning when the Gram is too
            close to singular.
        batch: channels removed between two scorings.

    Returns:
        Kept channels [keep] int64, rising, and the repaired projection [out, keep] fp32.

    Raises:
        ValueError: `keep` is not between 1 and the number of channels, or the Gram cannot be used.
    """
    channels = down.shape[1]
    if not 1 <= keep <= channels:
        raise ValueError(f"cannot keep {keep} of {channels} channels")
    return with_rising_damping(lambda tried: _remove(down, gram, keep, tried, batch), damping)


def _remove(down: Tensor, gram: Tensor, keep: int, damping: float, batch: int) -> tuple[Tensor, Tensor] | None:
    """One attempt; None when rounding has cost [H⁻¹]_SS its positive definiteness.

    The inverse for the channels that are left is H⁻¹ - QᵀQ (Schur complement; one row of Q per removed
    channel). It is never formed: only its diagonal is kept up, and the rows of a batch are made when they are
    needed. So a step reads Q and W, not channels².
    """
    channels = down.shape[1]
    weight = down.clone()
    inverted = inverse(gram, damping)
    diagonal = inverted.diagonal().clone()
    diagonal[gram.diagonal() == 0] = torch.inf
    alive = torch.ones(channels, dtype=torch.bool, device=down.device)
    removed = torch.empty(channels - keep, channels, dtype=down.dtype, device=down.device)
    for start in range(0, channels - keep, batch):
        earlier = removed[:start]
        cost = (weight.square().sum(0) / diagonal).masked_fill_(~alive, torch.inf)
        chosen = torch.argsort(cost, stable=True)[: min(batch, channels - keep - start)]
        rows = torch.addmm(inverted[chosen], earlier[:, chosen].mT, earlier, alpha=-1)
        root, failed = torch.linalg.cholesky_ex(rows[:, chosen])
        if failed.item():
            return None
        new = torch.linalg.solve_triangular(root, rows, upper=False)
        share = torch.linalg.solve_triangular(root.mT, weight[:, chosen], upper=True, left=False)
        weight.addmm_(share, new, alpha=-1)
        removed[start : start + len(chosen)] = new
        diagonal -= new.square().sum(0)
        alive[chosen] = False
    kept = alive.nonzero().flatten()
    return kept, weight[:, kept]
