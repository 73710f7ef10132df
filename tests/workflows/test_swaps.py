"""Swaps: exact, never a step back, and every count and pattern as it was."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import DAMPING, problem, solve, squared_error

from workflows.pruning import swaps
from workflows.pruning.patterns import parse, verify
from workflows.pruning.refit import refit
from workflows.pruning.swaps import swap
from workflows.scoring.gram import damped


def row_errors(weight: torch.Tensor, found: torch.Tensor, hessian: torch.Tensor) -> list[float]:
    return [squared_error((one - old)[None], hessian) for one, old in zip(found, weight, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rounds=st.integers(0, 3),
    share=st.floats(0, 1),
    zero_share=st.sampled_from([0, 0.3]),
    pattern=st.sampled_from(["unstructured", "2:4", "1:3", "5:8"]),
    name=st.sampled_from(["magnitude", "wanda", "sparsegpt", "admm"]),
)
def test_no_rows_error_rises_and_zeros_keep_their_number_and_pattern(seed, rounds, share, zero_share, pattern, name):
    weight, gram = problem(4, 72, seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < zero_share] = 0
    gram[7], gram[:, 7] = 0, 0
    hessian, group = damped(gram, DAMPING), parse(pattern)
    sparsity = share * (1 - group.keep / group.size)
    before = solve(name, weight, gram, pattern, sparsity)
    after = swap(weight, before, hessian, group, rounds)
    for worse, better in zip(row_errors(weight, before, hessian), row_errors(weight, after, hessian), strict=True):
        assert better <= worse * (1 + 1e-5) + 1e-5
    zeros, zeros_before = (
        (one == 0).reshape(4, -1, group.size if group.keep else 72).sum(-1) for one in (after, before)
    )
    assert torch.equal(zeros, zeros_before)
    assert (after[weight == 0] == 0).all()
    verify(after, pattern, sparsity)


def best_single_swap(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor, size: int) -> float:
    """The least error of one row after one swap or none, by trying all; the new weight from the definition."""
    weight, pruned, hessian = weight.double(), pruned.double(), hessian.double()
    errors = [squared_error(pruned - weight, hessian)]
    kept, gone = (one.tolist() for one in ((pruned[0] != 0).nonzero()[:, 0], (pruned[0] == 0).nonzero()[:, 0]))
    for out, into in itertools.product(kept, gone):
        if out // size == into // size:
            tried = pruned.clone()
            tried[0, out] = 0
            tried[0, into] = ((weight - tried) @ hessian)[0, into] / hessian[into, into]
            errors.append(squared_error(tried - weight, hessian))
    return min(errors)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_a_swap_is_the_best_of_all_and_a_round_at_least_that(pattern, monkeypatch):
    lower, group = 0, parse(pattern)
    choose = swaps._in_groups if group.keep else swaps._in_rows
    for seed in range(20):
        weight, gram = problem(1, 24, seed)
        hessian = damped(gram, DAMPING)
        pruned = refit(weight, solve("magnitude", weight, gram, pattern, 0.5), hessian, 30)
        best = best_single_swap(weight, pruned, hessian, group.size if group.keep else 24)
        lower += best < 0.999 * squared_error(pruned - weight, hessian)
        with monkeypatch.context() as patched:
            patched.setattr(swaps, "SWAPS", 1)
            residual = (weight - pruned) @ hessian
            once = swaps._swapped(pruned, residual, hessian, choose(weight, pruned, residual, hessian, group))
        assert squared_error(once - weight, hessian) == pytest.approx(best, rel=1e-4)
        assert squared_error(swap(weight, pruned, hessian, group, 1) - weight, hessian) <= best * (1 + 1e-5)
    assert lower > 5, "the cases show nothing"


def test_swaps_of_one_round_build_on_each_other():
    """Each is exact on what the one before left: the error falls with every further swap that a round may make."""
    weight, gram = problem(8, 96)
    hessian = damped(gram, DAMPING)
    pruned = refit(weight, solve("magnitude", weight, gram, "unstructured", 0.5), hessian, 30)
    residual = (weight - pruned) @ hessian
    candidates = swaps._in_rows(weight, pruned, residual, hessian, parse("unstructured"))
    errors = [sum(row_errors(weight, pruned, hessian))]
    with pytest.MonkeyPatch.context() as patched:
        for count in (1, 2, 4, 8):
            patched.setattr(swaps, "SWAPS", count)
            found = swaps._swapped(pruned, residual, hessian, candidates)
            errors.append(sum(row_errors(weight, found, hessian)))
            moved = ((found == 0) != (pruned == 0)).sum(1)
            assert (moved % 2 == 0).all()
            assert moved.max() <= 2 * count
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[1] < errors[0]


@pytest.mark.parametrize(("pattern", "most"), [("unstructured", 0.6), ("2:4", 0.9)])
def test_a_bad_mask_becomes_a_good_one(pattern, most):
    weight, gram = problem(16, 128)
    scale = torch.logspace(-1, 1, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    gram = gram * scale * scale[:, None]
    hessian = damped(gram, DAMPING)
    refitted = refit(weight, solve("magnitude", weight, gram, pattern, 0.5), hessian, 50)
    better = swap(weight, refitted, hessian, parse(pattern), 6)
    assert squared_error(better - weight, hessian) < most * squared_error(refitted - weight, hessian)


def test_rows_are_independent():
    weight, gram = problem(12, 64)
    hessian = damped(gram, DAMPING)
    pruned = solve("wanda", weight, gram, "unstructured", 0.5)
    group = parse("unstructured")
    alone = torch.cat([swap(weight[i : i + 4], pruned[i : i + 4], hessian, group, 3) for i in range(0, 12, 4)])
    torch.testing.assert_close(alone, swap(weight, pruned, hessian, group, 3), rtol=1e-3, atol=1e-4)


def test_no_rounds_change_nothing():
    weight, gram = problem(3, 32)
    pruned = solve("magnitude", weight, gram, "2:4", 0.5)
    assert torch.equal(swap(weight, pruned, damped(gram, DAMPING), parse("2:4"), 0), pruned)
