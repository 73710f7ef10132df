"""SparseGPT (Frantar & Alistarh 2023): from left to right, the columns after repair each column's error.

With H⁻¹ = UᵀU, the squared error of dropping w_i once all columns before i are fixed is (w_i / U_ii)²,
and the best repair of the columns after i subtracts w_i / U_ii · U_i,i+1: from them.
"""

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from workflows.pruning.patterns import Group, keep_mask_by_count, lowest_in_groups, parse, pruned_count
from workflows.scoring.gram import full_precision, inverse_factor

BLOCK_COLUMNS = 128
PIECE_COLUMNS = 16  # within a block: how far a column's error is repaired at once, column by column


class SparseGPT:
    """Second-order choice and repair; see `solvers.Solver`."""

    statistic: Final = "gram"

    def prepare(self, statistic: Tensor, damping: float) -> tuple[Tensor]:
        """The factor U [in, in]; its diagonal is infinite for dead inputs: their weights cost nothing."""
        factor = inverse_factor(statistic, damping)
        factor.diagonal()[statistic.diagonal() == 0] = torch.inf
        return (factor,)

    @full_precision()
    def solve(self, weight: Tensor, prepared: tuple[Tensor, ...], pattern: str, sparsity: float) -> Tensor:
        """Pruned and repaired rows [rows, in].

        Zeros of an earlier stage and weights of dead inputs are zero in the result even where they are more
        than the count asks for.
        """
        (factor,) = prepared
        if not torch.isfinite(weight).all():
            raise ValueError("the weights hold NaN or infinity")
        group = parse(pattern)
        rows, cols = weight.shape
        count = pruned_count(rows, cols, sparsity, pattern)
        steps = factor.diagonal()
        weight = weight.masked_fill(steps.isinf(), 0)
        was_zero = weight == 0
        if group.tile > 1:  # chosen for all columns at once, for some hold far more than others; then it is only repair
            scores = (weight / steps).abs_().masked_fill_(was_zero, -1)
            was_zero |= ~keep_mask_by_count(scores, group, count)
            group, count = Group(0, 1), 0
        edges = _block_edges(cols, group)
        counts = _counts_per_block(was_zero, edges, group, count)
        for (start, stop), block_count in zip(pairwise(edges), counts, strict=True):
            block = weight[:, start:stop].clone()
            errors = _solve_block(block, was_zero[:, start:stop], factor[start:stop, start:stop], group, block_count)
            weight[:, start:stop] = block
            weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
        return weight


def _block_edges(cols: int, group: Group) -> list[int]:
    """Borders of the column blocks: no group straddles one."""
    width = max(BLOCK_COLUMNS // group.size, 1) * group.size
    return [*range(0, cols, width), cols]


def _counts_per_block(was_zero: Tensor, edges: list[int], group: Group, count: int) -> list[int]:
    """Splits a count over column blocks, exactly: existing zeros, and the rest in proportion to the room."""
    rows = len(was_zero)
    capacities = [group.capacity(rows, stop - start) for start, stop in pairwise(edges)]
    zeros_in_groups = was_zero.reshape(rows, -1, group.size).sum(-1).clamp_(max=group.size - group.keep)
    per_column_group = zeros_in_groups.sum(0)
    taken = [int(per_column_group[a // group.size : b // group.size].sum()) for a, b in pairwise(edges)]
    room = [capacity - zeros for capacity, zeros in zip(capacities, taken, strict=True)]
    missing = max(count - sum(taken), 0)
    counts, room_so_far, given = [], 0, 0
    for zeros, own_room in zip(taken, room, strict=True):
        room_so_far += own_room
        until_here = missing * room_so_far // max(sum(room), 1)
        counts.append(zeros + until_here - given)
        given = until_here
    return counts


def _solve_block(block: Tensor, was_zero: Tensor, factor: Tensor, group: Group, count: int) -> Tensor:
    """Prunes and repairs a block [rows, width] in place; returns the scaled errors [rows, width].

    Unstructured masks are chosen for the whole block at its start; full N:M masks group by group, when the
    errors of the columns before have arrived.
    """
    rows, width = block.shape
    steps = factor.diagonal()
    by_group = count == group.capacity(rows, width)
    dropped = was_zero.clone()
    if not by_group:
        dropped |= ~keep_mask_by_count(_scores(block, steps, was_zero), group, count)
    columns, gone = block.T.contiguous(), dropped.T.contiguous()  # all steps go along a column
    errors = torch.empty_like(columns)
    piece = max(PIECE_COLUMNS // group.size, 1) * group.size
    for start in range(0, width, piece):
        stop = min(start + piece, width)
        for i in range(start, stop):
            if by_group and i % group.size == 0:
                own = slice(i, i + group.size)
                gone[own] |= lowest_in_groups(_scores(columns[own].T, steps[own], was_zero[:, own]), group).T
            torch.mul(columns[i], gone[i], out=errors[i]).div_(steps[i])
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    block.copy_(columns.masked_fill_(gone, 0).T)
    return errors.T


def _scores(weight: Tensor, steps: Tensor, was_zero: Tensor) -> Tensor:
    """(w / U_ii)²; below zero for what an earlier stage removed, though a repair may have moved it."""
    return (weight / steps).square_().masked_fill_(was_zero, -1)
