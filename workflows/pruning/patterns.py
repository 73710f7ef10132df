"""Which weights may go together, and exactly how many.

Every pattern is a group: of each `size` consecutive columns at least `keep` stay. "2:4" is (2, 4) and
"unstructured" is (0, 1), so one code path serves both. "16x16" is (0, 1) of tiles: aligned squares of 16 rows and
16 columns, whose weights go together. Masks are True where a weight is KEPT.
"""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

# The recipe allows this much between the written ratio and 1 - N/M (0.6667 is not 2/3).
RATIO_TOLERANCE = 1e-6
SAMPLE = 1 << 13  # scores, of which the threshold at 60 % is off by half a percent of all
LARGEST_TILE = 128


class Group(NamedTuple):
    """Of each `size` consecutive columns at least `keep` stay; `tile` is the edge of the squares that go as a whole.

    Only one of the two may be more than 1: weights go alone in groups, or tiles go freely.
    """

    keep: int
    size: int
    tile: int = 1

    def capacity(self, rows: int, cols: int) -> int:
        """Most weights that may go from rows × cols, of whole groups."""
        return rows * cols // self.size * (self.size - self.keep)


def parse(pattern: str) -> Group:
    """The group of a recipe's pattern.

    Raises:
        ValueError: it is neither "unstructured", nor "N:M" with 0 < N < M, nor "BxB" with 2 ≤ B ≤ 128.
    """
    if pattern == "unstructured":
        return Group(0, 1)
    if (found := re.fullmatch(r"(\d+):(\d+)", pattern)) and 0 < int(found[1]) < int(found[2]):
        return Group(int(found[1]), int(found[2]))
    if (found := re.fullmatch(r"(\d+)x\1", pattern)) and 2 <= int(found[1]) <= LARGEST_TILE:
        return Group(0, 1, int(found[1]))
    raise ValueError(
        f'pattern "{pattern}" gives no mask; use "unstructured", "N:M" with 0 < N < M, or "BxB" with B from 2 to '
        f"{LARGEST_TILE}"
    )


def pruned_count(rows: int, cols: int, sparsity: float, pattern: str = "unstructured") -> int:
    """Weights that go from rows × cols.

    Rounded up (to whole tiles), so that the sum over row chunks is never below the claim for the whole matrix.

    Raises:
        ValueError: the pattern allows less than this sparsity, or its groups or tiles do not fit the shape.
    """
    keep, size, tile = group = parse(pattern)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity} is not a share between 0 and 1")
    _check_shape(rows, cols, group)
    capacity = group.capacity(rows, cols)
    if abs(sparsity - (1 - keep / size)) <= RATIO_TOLERANCE:
        return capacity
    # The factor undoes float rounding: 0.55 × 100 is 55.00000000000001, and 55 is meant.
    count = math.ceil(rows * cols // tile**2 * sparsity * (1 - 1e-12)) * tile**2
    if count > capacity:
        raise ValueError(f"sparsity {sparsity:g} cannot be met by pattern {pattern}: at most {1 - keep / size:g}")
    return count


def keep_mask(scores: Tensor, pattern: str, sparsity: float, per_row: bool) -> Tensor:
    """Mask that keeps the highest scores and drops exactly `pruned_count` of them.

    Args:
        scores: [rows, cols], higher is more important; among equals the first index goes first. For tiles scores
            are lengths, of which the squares add up; below 0 means gone before, and such tiles go first.
        pattern: as in the recipe.
        sparsity: share that goes.
        per_row: the same number from each row, of weights or of tiles (give or take one, so that the total is
            exact), else the lowest of the whole matrix.

    Returns:
        [rows, cols] bool, True where the weight is kept.

    Raises:
        ValueError: pattern, sparsity and shape do not fit, or a score is NaN.
    """
    if torch.isnan(scores).any():
        raise ValueError("a score is NaN: the weights or the calibration inputs hold NaN or infinity")
    rows, cols = scores.shape
    count = pruned_count(rows, cols, sparsity, pattern)
    return keep_mask_by_count(scores, parse(pattern), count, per_row)


def keep_mask_by_count(scores: Tensor, group: Group, count: int, per_row: bool = False) -> Tensor:
    """As `keep_mask`, for a count that is known (at most what the group allows) and scores without NaN.

    A score at the threshold is selected for, not sorted for: solvers ask for a mask in every turn.
    """
    rows, cols = scores.shape
    _check_shape(rows, cols, group)
    if (tile := group.tile) > 1:
        keep = keep_mask_by_count(_tile_scores(scores, tile), Group(0, 1), count // tile**2, per_row)
        return keep.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    allowed = lowest_in_groups(scores, group)
    if count == group.capacity(rows, cols):
        return ~allowed
    lines = rows if per_row else 1
    if group.keep:
        scores = scores.masked_fill(~allowed, torch.inf)
    by_line, least = scores.reshape(lines, -1), count // lines
    ends = torch.arange(1, lines + 1, device=scores.device) * count // lines
    counts = torch.diff(ends, prepend=ends.new_zeros(1))[:, None]
    if lines == 1:
        threshold = _threshold(by_line[0], max(count, 1), cols)
    else:
        threshold = by_line.kthvalue(max(least, 1), dim=1, keepdim=True).values
        if count % lines:
            threshold = torch.where(counts > least, by_line.kthvalue(least + 1, dim=1, keepdim=True).values, threshold)
    below = by_line < threshold
    ties = (by_line == threshold) & allowed.reshape(lines, -1)
    below |= ties & (ties.cumsum(1, dtype=torch.int32) <= counts - below.sum(1, keepdim=True))
    return below.logical_not_().reshape(rows, cols)


def _threshold(scores: Tensor, place: int, cols: int) -> Tensor:
    """The score that is `place`-th from below, from 1 on, of a matrix in one line.

    On a processor it is selected from the few scores between two of a sample: selecting it from all would be a third of
    all that SparseGPT does. A GPU would have to wait until it is known how many these are.
    """
    if scores.is_cuda or len(scores) < 4 * SAMPLE:
        return scores.kthvalue(place).values
    sample = _sample(scores, cols)
    near, margin = place * len(sample) / len(scores), 2 * math.sqrt(len(sample))  # four deviations, or more
    low, high = (sample.kthvalue(min(max(round(near + off), 1), len(sample))).values for off in (-margin, margin))
    below = scores < low
    between, rest = scores[(scores <= high) & ~below], place - int(below.count_nonzero())
    return between.kthvalue(rest).values if 0 < rest <= len(between) else scores.kthvalue(place).values


def _sample(scores: Tensor, cols: int) -> Tensor:
    """Scores of a matrix in one line, in equal steps; of every column some, if the matrix is large enough."""
    step = max(len(scores) // SAMPLE, 1)
    while math.gcd(step, cols) > 1:  # else some columns would never be looked at
        step += 1
    return scores[::step]


def nearly_kept(scores: Tensor, group: Group, count: int) -> Tensor:
    """1 where a score is kept, else 0: as `keep_mask_by_count`, but of a large unstructured matrix about so many go.

    For masks on the way to one: selecting the threshold from all scores takes longer than anything else of a turn, so
    it is that of a sample. Numbers of the scores' type, because products with truth values take several times longer.
    Scores are at least 0, and what is 0 goes.
    """
    if group != Group(0, 1):
        return keep_mask_by_count(scores, group, count).to(scores.dtype)
    sample = _sample(scores.flatten(), scores.shape[1])
    place = min(round(count / scores.numel() * len(sample)), len(sample))
    threshold = sample.kthvalue(place).values if place else scores.new_zeros(())
    return torch.gt(scores, threshold, out=torch.empty_like(scores))


def lowest_in_groups(scores: Tensor, group: Group) -> Tensor:
    """True for the M - N lowest scores of each group, the first of equals first: the ones that may go. [rows, cols]."""
    if group.keep == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    rows, cols = scores.shape
    places = scores.reshape(rows, cols // group.size, group.size).movedim(2, 0).contiguous()
    return lowest_places(places, group).movedim(0, 2).reshape(rows, cols)


def lowest_places(scores: Tensor, group: Group) -> Tensor:
    """As `lowest_in_groups`, for scores [M, ...] that are sorted by their place in the group already."""
    # How many of its group come before each: comparing every two beats sorting many short lists.
    before = torch.zeros(scores.shape, dtype=torch.int16, device=scores.device)
    for place in range(1, group.size):
        first = scores[:place] <= scores[place]
        before[place] += first.sum(0, dtype=torch.int16)
        before[:place] += ~first
    return before < group.size - group.keep


def achieved(weight: Tensor) -> float:
    """Share of exact zeros; 0 for an empty tensor."""
    return zeros(weight) / max(weight.numel(), 1)


def zeros(weight: Tensor) -> int:
    """How many are exactly zero; truth values are counted many times faster than numbers."""
    return weight.numel() - int(weight.bool().count_nonzero())


def verify(weight: Tensor, pattern: str, sparsity: float) -> None:
    """Checks that a matrix has the zeros it claims; for after every cast and every tuning.

    Args:
        weight: [rows, cols], any type.
        pattern: as in the recipe.
        sparsity: share claimed. At an N:M pattern's own ratio each group is checked, below it only the count. Of
            tiles only those count that are zero as a whole.

    Raises:
        ValueError: fewer zeros than claimed, or a group with more than N non-zeros.
    """
    rows, cols = weight.shape
    group = parse(pattern)
    claimed = pruned_count(rows, cols, sparsity, pattern)
    alive = weight.bool()
    held = alive if group.tile == 1 else _tiles(alive, group.tile).any(3).any(1)
    found = group.tile**2 * zeros(held)
    if found < claimed:
        where = f" in whole tiles of {pattern}" if group.tile > 1 else ""
        raise ValueError(
            f"{found} of {weight.numel()} weights are zero{where}, but sparsity {sparsity:g} claims {claimed}"
        )
    if claimed == group.capacity(rows, cols):
        kept = alive.reshape(rows, cols // group.size, group.size).count_nonzero(-1)
        if broken := int((kept > group.keep).sum()):
            raise ValueError(f"{broken} groups of {group.size} columns keep more than {group.keep}: not {pattern}")


def _tiles(matrix: Tensor, tile: int) -> Tensor:
    """The same numbers as [rows of tiles, row in the tile, tiles, column in the tile]."""
    rows, cols = matrix.shape
    return matrix.reshape(rows // tile, tile, cols // tile, tile)


def _tile_scores(scores: Tensor, tile: int) -> Tensor:
    """Sums of squares, and -1 for tiles of which all is gone. [rows / tile, cols / tile]."""
    tiles = _tiles(scores, tile)
    return tiles.clamp(min=0).square_().sum((1, 3)).masked_fill_((tiles < 0).all(3).all(1), -1)


def _check_shape(rows: int, cols: int, group: Group) -> None:
    if cols % group.size:
        raise ValueError(f"pattern {group.keep}:{group.size} needs a multiple of {group.size} columns, not {cols}")
    if rows % group.tile or cols % group.tile:
        size = group.tile
        raise ValueError(f"pattern {size}x{size} needs multiples of {size} rows and columns, not {rows} and {cols}")
