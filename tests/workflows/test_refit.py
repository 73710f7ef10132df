"""Refit: the least-squares optimum on a mask, and never a step back. ADMM: near the best mask there is."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_solvers import DAMPING, exact_refit, problem, solve, squared_error

from workflows.pruning.refit import refit
from workflows.scoring.gram import damped


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("name", ["magnitude", "sparsegpt"])
def test_it_ends_at_the_least_squares_optimum(name, pattern):
    weight, gram = problem(12, 96)
    hessian = damped(gram, DAMPING)
    pruned = solve(name, weight, gram, pattern, 0.5)
    refitted = refit(weight, pruned, hessian, 200)
    expected = exact_refit(weight, hessian, pruned != 0)
    torch.testing.assert_close(refitted.double(), expected, rtol=1e-2, atol=2e-3)
    assert squared_error(refitted - weight, hessian) <= 1.0001 * squared_error(expected - weight.double(), hessian)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(0, 12),
    sparsity=st.floats(0, 1),
    name=st.sampled_from(["magnitude", "wanda", "sparsegpt", "admm"]),
)
def test_no_rows_error_ever_rises_and_zeros_stay(seed, steps, sparsity, name):
    weight, gram = problem(4, 48, seed)
    hessian = damped(gram, DAMPING)
    pruned = solve(name, weight, gram, "unstructured", sparsity)
    refitted = refit(weight, pruned, hessian, steps)
    for row in range(4):
        before, after = (squared_error((one - weight)[row : row + 1], hessian) for one in (pruned, refitted))
        assert after <= before * (1 + 1e-5) + 1e-6
    assert (refitted[pruned == 0] == 0).all()


def best_of_all_masks(weight: torch.Tensor, hessian: torch.Tensor, zeros: int) -> float:
    """Least error of one row over every mask with so many zeros, each with its optimal weights."""
    columns = weight.shape[1]
    masks = torch.ones(1, columns, dtype=torch.bool)
    errors = []
    for gone in itertools.combinations(range(columns), zeros):
        keep = masks.clone()
        keep[0, list(gone)] = False
        errors.append(squared_error(exact_refit(weight, hessian, keep) - weight.double(), hessian))
    return min(errors)


def test_admm_is_near_the_best_of_all_masks():
    shares = {"sparsegpt": [], "admm": []}
    for seed in range(12):
        weight, gram = problem(1, 10, seed)
        hessian = damped(gram, DAMPING)
        best = best_of_all_masks(weight, hessian, 5)
        for name, found in shares.items():
            found.append(squared_error(solve(name, weight, gram, "unstructured", 0.5) - weight, hessian) / best)
    means = {name: sum(found) / len(found) for name, found in shares.items()}
    assert min(shares["admm"]) >= 0.999
    assert means["admm"] < 1.25, means
    assert means["admm"] < means["sparsegpt"], means
