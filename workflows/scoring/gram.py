"""The Gram of a linear's inputs, G = XᵀX, and what solvers need of it: the damped inverse and its factor.

G is a plain sum over tokens, never an average: sums of shards add up, and no solver minds the scale.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import structlog
import torch
from torch import Tensor

log = structlog.get_logger()

DAMPING_TRIES = 4
NARROWEST = 256  # columns of a Gram that are worked on at once where only a triangle matters
STRIP = 1024  # columns that are worked on at once where a matrix changes in place
Found = TypeVar("Found")


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiplies fp32 matrices in fp32: no TF32, no bf16 in disguise. Also usable as a decorator."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_precision()
def add_inputs(gram: Tensor, x: Tensor) -> None:
    """Adds XᵀX to the upper triangle of a Gram in place, without a second Gram in memory; `mirror` does the rest, once.

    Columns are taken in strips, and of each only what lies right of its beginning: a little more than half of the
    products.

    Args:
        gram: [in, in] fp32, changed; what is below the diagonal is not to be used before `mirror`.
        x: [..., in] inputs of the linear, any floating type; leading dimensions are tokens.
    """
    tokens = x.detach().reshape(-1, x.shape[-1]).float()
    step = max(NARROWEST, len(gram) // 8)
    for start in range(0, len(gram), step):
        gram[start : start + step, start:].addmm_(tokens[:, start : start + step].mT, tokens[:, start:])


def mirror(gram: Tensor) -> Tensor:
    """Copies the upper triangle to below the diagonal, in place; returns the Gram."""
    _fill_below(gram, gram)
    return gram


def fold(gram: Tensor) -> Tensor:
    """Moves the upper triangle into the upper half, in place, so that half of a Gram is all that travels and is added.

    That of the lower right quarter, but for its first row, goes below the diagonal of the upper left one: the
    rectangular full packed format of LAPACK (Gustavson et al. 2010), up to the order of its parts.

    Args:
        gram: [in, in], of which only the upper triangle is looked at.

    Returns:
        A view, [in / 2 + 1, in]; a Gram with an odd number of inputs is left as it is.
    """
    half, odd = divmod(len(gram), 2)
    if odd:
        return gram
    _fill_below(gram[:half, :half], gram[half + 1 :, half:])
    return gram[: half + 1]


def unfold(folded: Tensor) -> Tensor:
    """The whole symmetric Gram [in, in] of a folded one, as a new tensor; with an odd number of inputs in place."""
    rows, size = folded.shape
    if rows == size:
        return mirror(folded)
    gram = folded.new_empty(size, size)
    gram[:rows] = folded
    gram[rows:, rows - 1 :] = folded[: rows - 1, : rows - 2].mT  # below its diagonal anything: that is mirrored
    return mirror(gram)


def _fill_below(matrix: Tensor, above: Tensor) -> None:
    """Makes matrix[i, j] = above[j, i] for all i > j, in place. They may be the same."""
    size = len(matrix)
    step = max(NARROWEST, size // 16)
    for start in range(0, size, step):
        columns = slice(start, min(start + step, size))
        lower = above[columns, columns].mT.tril(-1)
        matrix[columns, columns].triu_()[:, : lower.shape[1]].add_(lower)
        for below in range(columns.stop, size, step):
            rows = slice(below, min(below + step, size))
            matrix[rows, columns] = above[columns, rows].contiguous().mT.contiguous()  # so turned four times as fast


def damped(gram: Tensor, damping: float) -> Tensor:
    """The invertible H = G + λI, with λ = damping × mean diagonal of G.

    An input that was always zero (a dead input: zero row and column) gets 1 on the diagonal.

    Args:
        gram: [in, in] fp32.
        damping: λ as a share of the mean diagonal.

    Returns:
        H as a new tensor [in, in].

    Raises:
        ValueError: the diagonal is negative or not finite, so this is no Gram.
    """
    return _damp_in_place(gram.clone(), damping)


def factor_of(gram: Tensor, damping: float) -> Tensor:
    """Lower triangular F with H = FᵀF, H the damped Gram: the factor that SparseGPT walks along.

    With J the reversal of the order, JHJ = LLᵀ gives F = J Lᵀ J. No inverse is made, and beside the Gram there is one
    more matrix: at a width of 14,336 each is 784 MiB.

    Args:
        gram: [in, in] fp32.
        damping: first λ as a share of the mean diagonal; ×10 with a warning each time that Cholesky fails.

    Returns:
        F [in, in] fp32, zeros above the diagonal.

    Raises:
        ValueError: no Gram, or not positive definite even with the last damping.
    """
    by_rows = _cholesky(gram, damping, reverse=True).mT  # the same buffer, row after row: Lᵀ
    _reverse(by_rows)
    return by_rows


def inverse(gram: Tensor, damping: float) -> Tensor:
    """H⁻¹ of the damped Gram, symmetric.

    Args:
        gram: [in, in] fp32.
        damping: as for `factor_of`.

    Returns:
        H⁻¹ [in, in] fp32.

    Raises:
        ValueError: no Gram, or not positive definite even with the last damping.
    """
    factor = _cholesky(gram, damping, reverse=False)
    return torch.cholesky_inverse(factor, out=factor)  # beside the Gram one matrix, as for the factor


def with_rising_damping(attempt: Callable[[float], Found | None], damping: float) -> Found:
    """Calls `attempt` until it finds something: each None is logged and raises the damping tenfold.

    Args:
        attempt: takes a damping; returns its result, or None when the matrix was not positive definite.
        damping: the first one.

    Raises:
        ValueError: the last of `DAMPING_TRIES` attempts failed too. Going on to where λ swamps G, or
            taking an identity instead, would hide that the calibration data say nothing.
    """
    tried = damping
    for _ in range(DAMPING_TRIES):
        found = attempt(tried)
        if found is not None:
            return found
        log.warning("Gram is not positive definite, damping is raised", failed=tried)
        tried *= 10
    raise ValueError(
        f"the Gram of the calibration inputs is not positive definite, even with damping {tried / 10:g}; "
        "use more or other calibration data, or a larger solver.damping"
    )


def _cholesky(gram: Tensor, damping: float, *, reverse: bool) -> Tensor:
    """Lower factor of the damped Gram, or of the damped Gram in reversed order of inputs; column after column."""

    def attempt(tried: float) -> Tensor | None:
        copied = gram.clone(memory_format=torch.contiguous_format)
        if reverse:
            _reverse(copied)
        matrix = _damp_in_place(copied.mT, tried)  # the same matrix, with columns lying together as LAPACK wants
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        return None if failed.item() else matrix

    return with_rising_damping(attempt, damping)


def _reverse(matrix: Tensor) -> None:
    """A → JAJ in place, for rows that lie one after the other: all of it from the last number to the first."""
    flat = matrix.view(-1)
    size, half, step = len(flat), len(flat) // 2, STRIP * len(matrix)
    for start in range(0, half, step):
        stop = min(start + step, half)
        front = flat[start:stop].flip(0)
        flat[start:stop] = flat[size - stop : size - start].flip(0)
        flat[size - stop : size - start] = front


def _damp_in_place(matrix: Tensor, damping: float) -> Tensor:
    diagonal = matrix.diagonal()
    if not torch.isfinite(diagonal).all() or (diagonal < 0).any():
        raise ValueError(
            "the Gram's diagonal is negative or not finite: the calibration inputs overflowed or hold NaN; "
            "check the model on this data, or run its blocks in float32"
        )
    dead = diagonal == 0
    diagonal += damping * diagonal.mean()
    diagonal[dead] = 1
    return matrix
