"""Swaps: a weight that was kept goes and one that went comes back, where a row's error falls by it.

The error of a row is e(w) = (w - w₀) H (w - w₀)ᵀ, with the residual r = (w₀ - w) H. Expanding e(w + d) = e(w) - 2 d rᵀ
+ d H dᵀ: to zero the kept w_i costs 2 r_i w_i + w_i² H_ii and leaves the residual r_j + w_i H_ij at j; the pruned j
then takes its best value, that residual over H_jj. Together the swap changes the error by exactly

    2 r_i w_i + w_i² H_ii - (r_j + w_i H_ij)² / H_jj

In a round each row makes its best swap among some candidates again and again, always on the residual that the swap
before left, and is refitted on its new mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from workflows.pruning.patterns import Group
from workflows.pruning.refit import refit
from workflows.scoring.gram import full_precision

CANDIDATES = 64  # of each kind and row in a round
SWAPS = 16  # of a row in a round
REFIT_STEPS = 12


class Candidates(NamedTuple):
    """Columns that a row may drop and add in a round, each [rows, candidates]; and which pairs may be swapped."""

    drops: Tensor
    adds: Tensor
    pairs: Tensor


@full_precision()
def swap(dense: Tensor, pruned: Tensor, hessian: Tensor, group: Group, rounds: int) -> Tensor:
    """Exchanges kept and pruned weights, and refits, as long as errors fall.

    Rows are independent. The error of no row rises: a row stays as it was in a round that did not make it better.
    As many weights of a row (of a group, for N:M) are zero as before, and zeros of W₀ stay.

    Args:
        dense: W₀ [rows, in] fp32.
        pruned: W [rows, in] fp32, where to start.
        hessian: H [in, in], positive definite.
        group: the pattern's; swaps stay inside a group.
        rounds: at most so many.

    Returns:
        The rows with their new masks and weights, as a new tensor.
    """
    best, residual = pruned.clone(), (dense - pruned) @ hessian
    error = ((dense - pruned) * residual).sum(1, keepdim=True)
    for _ in range(rounds):
        choose = _in_groups if group.keep else _in_rows
        swapped = _swapped(best, residual, hessian, choose(dense, best, residual, hessian, group))
        tried = refit(dense, swapped, hessian, REFIT_STEPS)
        tried_residual = (dense - tried) @ hessian
        tried_error = ((dense - tried) * tried_residual).sum(1, keepdim=True)
        fell = tried_error < error
        if not fell.any():
            break
        best, residual = torch.where(fell, tried, best), torch.where(fell, tried_residual, residual)
        error = torch.where(fell, tried_error, error)
    return best


def _drop_costs(weight: Tensor, residual: Tensor, diagonal: Tensor) -> Tensor:
    """What it costs to zero each weight; infinite for those that are zero."""
    return (2 * residual + weight * diagonal).mul_(weight).masked_fill_(weight == 0, torch.inf)


def _addable(dense: Tensor, weight: Tensor) -> Tensor:
    return (weight == 0) & (dense != 0)


def _in_rows(dense: Tensor, weight: Tensor, residual: Tensor, hessian: Tensor, group: Group) -> Candidates:
    """The cheapest to drop and the best to add, seen alone; any of them with any."""
    diagonal, addable = hessian.diagonal(), _addable(dense, weight)
    count = min(CANDIDATES, weight.shape[1])
    costs, drops = _drop_costs(weight, residual, diagonal).topk(count, largest=False)
    adds = (residual.square() / diagonal).masked_fill_(~addable, -1).topk(count).indices
    return Candidates(drops, adds, costs.isfinite()[:, :, None] & addable.gather(1, adds)[:, None])


def _in_groups(dense: Tensor, weight: Tensor, residual: Tensor, hessian: Tensor, group: Group) -> Candidates:
    """The best pair of each group, of the groups in which it is best."""
    shape = len(weight), -1, group.size
    groups = weight.shape[1] // group.size
    diagonal, kept = hessian.diagonal(), weight.reshape(shape)
    within = hessian.reshape(groups, group.size, groups, group.size).diagonal(dim1=0, dim2=2).movedim(2, 0)
    costs = _drop_costs(weight, residual, diagonal).reshape(shape)
    left, addable = residual.reshape(shape), _addable(dense, weight).reshape(shape)
    best = torch.full_like(costs[..., 0], torch.inf)
    drops, adds = torch.zeros_like(best, dtype=torch.int64), torch.zeros_like(best, dtype=torch.int64)
    for place in range(group.size):
        gains = (left + kept[..., place, None] * within[:, place]).square_() / diagonal.reshape(shape[1:])
        gain, partner = gains.masked_fill_(~addable, -torch.inf).max(-1)
        change = costs[..., place] - gain
        drops, adds = torch.where(change < best, place, drops), torch.where(change < best, partner, adds)
        best = torch.minimum(best, change)
    best, chosen = best.topk(min(CANDIDATES, groups), largest=False)
    drops, adds = (chosen * group.size + places.gather(1, chosen) for places in (drops, adds))
    own = torch.eye(chosen.shape[1], dtype=torch.bool, device=weight.device)
    return Candidates(drops, adds, best.isfinite()[:, :, None] & own)


def _swapped(weight: Tensor, residual: Tensor, hessian: Tensor, candidates: Candidates) -> Tensor:
    """The rows after their swaps, not refitted. Each candidate is in one swap at most."""
    drops, adds, pairs = candidates
    weight, pairs, count = weight.clone(), pairs.clone(), drops.shape[1]
    rows, columns = torch.arange(len(weight), device=weight.device), torch.cat([drops, adds], 1)
    left = residual.gather(1, columns)
    kept, coupling = weight.gather(1, drops), hessian[drops[:, :, None], adds[:, None]]
    drop_curvature, add_curvature = hessian.diagonal()[drops], hessian.diagonal()[adds]
    for _ in range(min(SWAPS, count)):
        costs = (2 * left[:, :count] + kept * drop_curvature) * kept
        moved = torch.addcmul(left[:, None, count:], kept[:, :, None], coupling)
        changes = costs[:, :, None] - moved.square() / add_curvature[:, None]
        change, pair = changes.masked_fill_(~pairs | (moved == 0), torch.inf).flatten(1).min(1)
        out, into = pair // count, pair % count
        dropped = torch.where(change < 0, kept[rows, out], 0)
        added = torch.where(change < 0, moved[rows, out, into] / add_curvature[rows, into], 0)
        weight[rows, drops[rows, out]] -= dropped
        weight[rows, adds[rows, into]] += added
        left += dropped[:, None] * hessian[drops[rows, out][:, None], columns]
        left -= added[:, None] * hessian[adds[rows, into][:, None], columns]
        pairs[rows, out], pairs[rows, :, into] = False, False
    return weight
