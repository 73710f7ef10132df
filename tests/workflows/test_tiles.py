"""Square tiles: they go whole, in the exact number, the least important ones, with every solver."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import DAMPING, columnwise_reference, problem, solve, squared_error

from workflows.formats.compact import pack, unpack
from workflows.pruning.patterns import keep_mask, pruned_count, verify
from workflows.pruning.refit import refit
from workflows.pruning.solvers import SOLVERS
from workflows.scoring.gram import damped

SPARSITIES = st.floats(0, 1, allow_nan=False)


def tiles_of(matrix: torch.Tensor, tile: int) -> torch.Tensor:
    """[tiles down, tiles across, weights of a tile]."""
    return torch.stack(
        [torch.stack([one.flatten() for one in strip.split(tile, 1)]) for strip in matrix.split(tile, 0)]
    )


@settings(max_examples=60, deadline=None)
@given(
    tile=st.integers(2, 5),
    down=st.integers(1, 4),
    across=st.integers(1, 5),
    levels=st.integers(1, 20),
    sparsity=SPARSITIES,
    per_row=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_masks_are_whole_tiles_of_the_exact_number_and_the_least_go(
    tile, down, across, levels, sparsity, per_row, seed
):
    scores = torch.randint(
        0, levels, (down * tile, across * tile), generator=torch.Generator().manual_seed(seed)
    ).float()
    keep = tiles_of(keep_mask(scores, f"{tile}x{tile}", sparsity, per_row), tile)
    assert (keep.all(2) | ~keep.any(2)).all()
    gone, squares = ~keep[..., 0], tiles_of(scores, tile).square().sum(2)
    assert int(gone.sum()) * tile**2 == pruned_count(down * tile, across * tile, sparsity, f"{tile}x{tile}")
    assert int(gone.sum()) == math.ceil(down * across * sparsity * (1 - 1e-12))
    for out, row in zip(gone, squares, strict=True) if per_row else [(gone, squares)]:
        if out.any() and not out.all():
            assert row[out].max() <= row[~out].min()
    if per_row:
        assert gone.sum(1).max() - gone.sum(1).min() <= 1


def test_tiles_that_are_gone_go_first_and_single_zeros_count_nothing():
    scores = torch.tensor([[0.5, -1.0, -1.0, -1.0, 0.0, 0.0], [0.5, -1.0, -1.0, -1.0, 0.1, 0.0]])
    kept = [keep_mask(scores, "2x2", share, per_row=False)[0, ::2].tolist() for share in (1 / 3, 2 / 3)]
    assert kept == [[True, False, True], [True, False, False]]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), cols=st.integers(1, 20), chunk=st.integers(1, 20), tile=st.integers(2, 8), share=SPARSITIES
)
def test_row_chunks_are_at_most_a_tile_over_the_claim_each(rows, cols, chunk, tile, share):
    pattern, cols = f"{tile}x{tile}", cols * tile
    sizes = [min(chunk, rows - start) * tile for start in range(0, rows, chunk)]
    total = sum(pruned_count(size, cols, share, pattern) for size in sizes)
    assert pruned_count(rows * tile, cols, share, pattern) <= total <= rows * tile * cols * share + len(sizes) * tile**2


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(SOLVERS)),
    tile=st.sampled_from([2, 4, 8, 16]),
    shares=st.tuples(SPARSITIES, SPARSITIES).map(sorted),
    zero_share=st.sampled_from([0, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_stages_of_every_solver_are_exact_and_revive_nothing(name, tile, shares, zero_share, seed):
    weight, gram = problem(16, 144, seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < zero_share] = 0
    before, pattern = weight, f"{tile}x{tile}"
    for share in shares:
        after = solve(name, before, gram, pattern, share)
        verify(after, pattern, share)
        verify(refit(before, after, damped(gram, DAMPING), 5), pattern, share)
        assert (after[before == 0] == 0).all()
        whole = int((tiles_of(after, tile) == 0).all(2).sum())
        assert whole * tile**2 == max(
            pruned_count(16, 144, share, pattern), int((tiles_of(before, tile) == 0).all(2).sum()) * tile**2
        )
        if not zero_share:
            assert int((after == 0).sum()) == whole * tile**2
        before = after


@pytest.mark.parametrize("tile", [4, 16])
def test_sparsegpt_repairs_tiles_as_the_columnwise_algorithm_does(tile):
    weight, gram = problem(16, 272)
    pruned = solve("sparsegpt", weight, gram, f"{tile}x{tile}", 0.4)
    expected = columnwise_reference(weight, damped(gram, DAMPING), pruned == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("tile", [4, 16])
def test_better_statistics_give_less_error(tile, sparsity):
    weight, gram = problem(32, 256)
    scale = torch.logspace(-1, 1, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    gram = gram * scale * scale[:, None]
    errors = [
        squared_error(solve(name, weight, gram, f"{tile}x{tile}", sparsity) - weight, gram)
        for name in ("magnitude", "wanda", "sparsegpt", "admm")
    ]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[2] < 0.7 * errors[0]


def test_dead_inputs_go_whole_and_cost_nothing():
    weight, gram = problem(16, 64)
    gram[16:24], gram[:, 16:24] = 0, 0
    for name in ("wanda", "sparsegpt", "admm"):
        pruned = solve(name, weight, gram, "8x8", 1 / 8)
        assert (pruned[:, 16:24] == 0).all()
        torch.testing.assert_close(pruned[:, :16], weight[:, :16], rtol=1e-4, atol=1e-4)


def test_verify_counts_whole_tiles_only():
    weight = torch.ones(8, 8, dtype=torch.bfloat16)
    weight[:4, :4] = weight[4:, 4:] = 0
    verify(weight, "4x4", 0.5)
    weight[0, 0], weight[0, 7] = 1, 0
    verify(weight, "4x4", 0.25)
    verify(weight, "unstructured", 0.5)
    with pytest.raises(
        ValueError, match=r"16 of 64 weights are zero in whole tiles of 4x4, but sparsity 0\.5 claims 32"
    ):
        verify(weight, "4x4", 0.5)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_rows_and_columns_must_hold_whole_tiles(shape):
    for check in (
        lambda: keep_mask(torch.ones(shape), "4x4", 0.5, per_row=False),
        lambda: verify(torch.ones(shape), "4x4", 0.5),
        lambda: pruned_count(*shape, 0.5, "4x4"),
    ):
        with pytest.raises(ValueError, match=f"pattern 4x4 needs multiples of 4 rows and columns, not {shape[0]} and"):
            check()


def test_the_compact_form_packs_tiles():
    weight, gram = problem(16, 64)
    pruned = {"w": solve("sparsegpt", weight, gram, "8x8", 0.5)}
    archive, shapes = pack(pruned)
    assert sum(one.nbytes for one in archive.values()) < 0.55 * pruned["w"].nbytes
    assert torch.equal(unpack(archive, shapes)["w"], pruned["w"])
