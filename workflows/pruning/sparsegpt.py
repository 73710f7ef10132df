"""SparseGPT (Frantar & Alistarh 2023): from left to right, the columns after repair each column's error.

With H = FᵀF and F lower triangular, a row whose weights have moved by δ is off by Σ_i (Σ_{j≤i} F_ij δ_j)²: column i
ends a term, which it can bring to zero as long as it is free. So dropping w_i once all columns before i are fixed costs
(w_i F_ii)². A block of columns is brought to its best in one product with all that is fixed before it; within a block,
U = (F_BB)⁻ᵀ repairs column by column: the best repair of those after i subtracts w_i / U_ii · U_i,i+1: from them.
"""

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from workflows.pruning.patterns import Group, keep_mask_by_count, lowest_places, parse, pruned_count
from workflows.scoring.gram import factor_of, full_precision

BLOCK_COLUMNS = 128
PIECE_COLUMNS = 16  # within a block: how far a column's error is repaired at once, column by column


class SparseGPT:
    """Second-order choice and repair; see `solvers.Solver`."""

    statistic: Final = "gram"

    def prepare(self, statistic: Tensor, damping: float) -> tuple[Tensor]:
        """The factor F [in, in]; its diagonal is 0 for dead inputs: their weights cost nothing."""
        factor = factor_of(statistic, damping)
        factor.diagonal()[statistic.diagonal() == 0] = 0
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
        costs = factor.diagonal()
        dense = weight.masked_fill(costs == 0, 0)
        was_zero = dense == 0
        if group.tile > 1:  # chosen for all columns at once, for some hold far more than others; then it is only repair
            scores = (dense * costs).abs_().masked_fill_(was_zero, -1)
            was_zero |= ~keep_mask_by_count(scores, group, count)
            group, count = Group(0, 1), 0
        edges = _block_edges(cols, group)
        counts = _counts_per_block(was_zero, edges, group, count)
        solved, moved = torch.empty_like(dense), torch.empty_like(dense)
        for (start, stop), block_count in zip(pairwise(edges), counts, strict=True):
            own = slice(start, stop)
            repairs = _repairs(factor[own, own])
            off = moved[:, :start] @ factor[own, :start].mT
            block = torch.addmm(dense[:, own], off, repairs, alpha=-1)
            _solve_block(block, was_zero[:, own], repairs, group, block_count)
            solved[:, own] = block
            torch.sub(block, dense[:, own], out=moved[:, own])
        return solved


def _repairs(factor: Tensor) -> Tensor:
    """U [width, width] of a block of F, upper triangular; a dead input leads to no other."""
    dead = torch.diag_embed((factor.diagonal() == 0).to(factor.dtype))
    one = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor + dead, one, upper=False).mT


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


def _solve_block(block: Tensor, was_zero: Tensor, factor: Tensor, group: Group, count: int) -> None:
    """Prunes and repairs a block [rows, width] in place; the factor is U.

    Unstructured masks are chosen for the whole block at its start; full N:M masks group by group, when the
    errors of the columns before have arrived.
    """
    rows, width = block.shape
    steps = factor.diagonal()
    by_group = count == group.capacity(rows, width)
    dropped = was_zero.clone()
    if not by_group:
        dropped |= ~keep_mask_by_count(_scores(block, steps, was_zero), group, count)
    columns, was_gone = block.T.contiguous(), was_zero.T.contiguous()  # all steps go along a column
    gone = dropped.T.to(block.dtype, memory_format=torch.contiguous_format)  # a product with truth values takes longer
    errors = torch.empty_like(columns)
    by_column = list(zip(columns, gone, errors, steps, strict=True))
    piece = max(PIECE_COLUMNS // group.size, 1) * group.size
    for start in range(0, width, piece):
        stop = min(start + piece, width)
        for i in range(start, stop):
            if by_group and i % group.size == 0:
                own = slice(i, i + group.size)
                lowest = lowest_places(_scores(columns[own], steps[own, None], was_gone[own]), group)
                gone[own].masked_fill_(lowest, 1)
            column, goes, error, step = by_column[i]
            torch.mul(column, goes, out=error).div_(step)
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[start:stop], alpha=-1)
    block.copy_(columns.masked_fill_(gone.bool(), 0).T)


def _scores(weight: Tensor, steps: Tensor, was_zero: Tensor) -> Tensor:
    """(w / U_ii)²; below zero for what an earlier stage removed, though a repair may have moved it."""
    return (weight / steps).square_().masked_fill_(was_zero, -1)
