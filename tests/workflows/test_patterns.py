"""Masks are exact, valid and deterministic, whatever the scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.pruning.patterns import achieved, keep_mask, parse, pruned_count, verify

FEW = settings(max_examples=60, deadline=None)
SPARSITIES = st.floats(0, 1, allow_nan=False)


@st.composite
def score_matrices(draw: st.DrawFn, width_multiple: int = 1) -> torch.Tensor:
    """Small matrices with many ties: ties are where counts go wrong."""
    rows = draw(st.integers(1, 7))
    cols = draw(st.integers(1, 6)) * width_multiple
    levels = draw(st.integers(1, 50))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels, (rows, cols), generator=generator).float()


@FEW
@given(score_matrices(), SPARSITIES)
def test_per_matrix_count_is_exact_and_lowest_go(scores: torch.Tensor, sparsity: float) -> None:
    keep = keep_mask(scores, "unstructured", sparsity, per_row=False)
    assert int((~keep).sum()) == pruned_count(*scores.shape, sparsity)
    if keep.any() and not keep.all():
        assert scores[~keep].max() <= scores[keep].min()


@FEW
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 200, 2**24]), SPARSITIES, st.booleans())
def test_the_threshold_of_a_large_matrix_is_found_from_a_sample(
    seed: int, levels: int, sparsity: float, in_order: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (130, 256), generator=generator).float()
    if in_order:  # the sample of a sorted matrix says most, that of one with few values next to nothing
        scores = scores.flatten().sort().values.reshape(scores.shape)
    count = pruned_count(*scores.shape, sparsity)
    goes = torch.zeros(scores.numel(), dtype=torch.bool)
    goes[scores.flatten().sort(stable=True).indices[:count]] = True
    assert torch.equal(keep_mask(scores, "unstructured", sparsity, per_row=False), ~goes.reshape(scores.shape))


@FEW
@given(score_matrices(), SPARSITIES)
def test_per_row_counts_are_exact_and_differ_by_one_at_most(scores: torch.Tensor, sparsity: float) -> None:
    keep = keep_mask(scores, "unstructured", sparsity, per_row=True)
    per_row = (~keep).sum(1)
    assert int(per_row.sum()) == pruned_count(*scores.shape, sparsity)
    assert int(per_row.max() - per_row.min()) <= 1
    for row, kept in zip(scores, keep, strict=True):
        if kept.any() and not kept.all():
            assert row[~kept].max() <= row[kept].min()


@FEW
@given(st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4), (1, 3), (5, 7)]), st.data())
def test_full_n_m_keeps_exactly_the_n_highest_of_each_group(n_m: tuple[int, int], data: st.DataObject) -> None:
    n, m = n_m
    scores = data.draw(score_matrices(width_multiple=m))
    for per_row in (False, True):
        keep = keep_mask(scores, f"{n}:{m}", 1 - n / m, per_row)
        groups, kept = scores.reshape(-1, m), keep.reshape(-1, m)
        assert (kept.sum(1) == n).all()
        assert (groups.masked_fill(kept, -math.inf).amax(1) <= groups.masked_fill(~kept, math.inf).amin(1)).all()


@FEW
@given(st.sampled_from([(2, 4), (4, 8), (1, 3)]), st.floats(0, 1), st.booleans(), st.data())
def test_early_stage_of_n_m_is_exact_and_leaves_the_target_reachable(
    n_m: tuple[int, int], share: float, per_row: bool, data: st.DataObject
) -> None:
    n, m = n_m
    scores = data.draw(score_matrices(width_multiple=m))
    sparsity = share * (1 - n / m)
    keep = keep_mask(scores, f"{n}:{m}", sparsity, per_row)
    assert int((~keep).sum()) == pruned_count(*scores.shape, sparsity, f"{n}:{m}")
    assert (keep.reshape(-1, m).sum(1) >= n).all()
    if per_row:
        per_row_counts = (~keep).sum(1)
        assert int(per_row_counts.max() - per_row_counts.min()) <= 1


def test_early_stage_of_n_m_takes_the_lowest_that_may_go() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0]])
    keep = keep_mask(scores, "2:4", 3 / 8, per_row=False)
    # 1 and 2 go; 3 is lower than 6, but its group has given two.
    assert keep.tolist() == [[False, False, True, True, True, True, True, False]]


def test_ties_go_by_index() -> None:
    assert keep_mask(torch.zeros(2, 4), "unstructured", 0.5, per_row=False).tolist() == [
        [False] * 4,
        [True] * 4,
    ]
    assert keep_mask(torch.zeros(1, 4), "2:4", 0.5, per_row=False).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    ("rows", "cols", "sparsity", "pattern", "count"),
    [
        (1, 100, 0.55, "unstructured", 55),
        (10, 10, 0.07, "unstructured", 7),
        (3, 3, 0.5, "unstructured", 5),
        (4, 9, 1 - 1 / 3, "1:3", 24),
        (2560, 8193, 0.666667, "1:3", 2560 * 8193 * 2 // 3),
        (3, 8, 0.0, "2:4", 0),
    ],
)
def test_counts(rows: int, cols: int, sparsity: float, pattern: str, count: int) -> None:
    assert pruned_count(rows, cols, sparsity, pattern) == count


@FEW
@given(st.integers(1, 700), st.integers(1, 64), st.integers(1, 300), SPARSITIES)
def test_row_chunks_together_never_fall_below_the_claim(rows: int, cols: int, chunk: int, sparsity: float) -> None:
    sizes = [min(chunk, rows - start) for start in range(0, rows, chunk)]
    total = sum(pruned_count(size, cols, sparsity) for size in sizes)
    assert pruned_count(rows, cols, sparsity) <= total <= rows * cols * sparsity + len(sizes)


@pytest.mark.parametrize(
    "pattern", ["4:2", "2:2", "0:4", "ffn", "2:4:8", "", "-1:4", "2:4 ", "16x8", "1x1", "129x129", "x"]
)
def test_unknown_patterns_are_named(pattern: str) -> None:
    with pytest.raises(ValueError, match=f'pattern "{pattern}"'):
        parse(pattern)


def test_columns_must_hold_whole_groups() -> None:
    for check in (
        lambda: keep_mask(torch.ones(2, 6), "2:4", 0.5, per_row=False),
        lambda: verify(torch.ones(2, 6), "2:4", 0.5),
        lambda: pruned_count(2, 6, 0.5, "2:4"),
    ):
        with pytest.raises(ValueError, match="pattern 2:4 needs a multiple of 4 columns, not 6"):
            check()


def test_more_than_the_pattern_allows_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sparsity 0\.6 cannot be met by pattern 2:4: at most 0\.5"):
        keep_mask(torch.ones(10, 8), "2:4", 0.6, per_row=False)
    with pytest.raises(ValueError, match="not a share"):
        pruned_count(2, 2, math.nan)


def test_nan_scores_are_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        keep_mask(torch.tensor([[1.0, math.nan]]), "unstructured", 0.5, per_row=False)


def test_verify_counts_zeros() -> None:
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    weight[:, :4] = 0
    assert achieved(weight) == 0.5
    verify(weight, "unstructured", 0.5)
    verify(weight, "2:4", 0.4)
    weight[2, 1] = 1
    with pytest.raises(ValueError, match=r"15 of 32 weights are zero, but sparsity 0\.5 claims 16"):
        verify(weight, "unstructured", 0.5)


def test_verify_checks_each_group() -> None:
    weight = torch.ones(2, 8)
    weight[:, [0, 1, 4, 5]] = 0
    verify(weight, "2:4", 0.5)
    weight[0, 1], weight[0, 6] = 1, 0
    with pytest.raises(ValueError, match=r"1 groups of 4 columns keep more than 2: not 2:4"):
        verify(weight, "2:4", 0.5)


def test_achieved_of_nothing_is_nothing() -> None:
    assert achieved(torch.empty(0, 3)) == 0
