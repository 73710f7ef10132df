"""Growing ratios on one Gram."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workflows.pruning import patterns
from workflows.pruning.rows import growing, prune_rows
from workflows.pruning.solvers import SOLVERS
from workflows.recipe import Solver
from workflows.scoring.gram import damped


def problem(rows: int = 32, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, width // 4, generator=chance) @ torch.randn(width // 4, width, generator=chance)
    inputs += 0.3 * torch.randn(256, width, generator=chance)
    return torch.randn(rows, width, generator=chance), inputs.mT @ inputs


def error(weight: torch.Tensor, found: torch.Tensor, gram: torch.Tensor) -> float:
    change = found - weight
    return float(((change @ gram) * change).sum())


def pruned(how: Solver, pattern: str, share: float) -> float:
    weight, gram = problem()
    hessian = damped(gram, how.damping) if how.goes_on else None
    found = prune_rows(weight, SOLVERS[how.name].prepare(gram, how.damping), hessian, pattern, share, how)
    patterns.verify(found, pattern, share)
    return error(weight, found, gram)


@given(st.floats(0.01, 0.99), st.integers(1, 64))
def test_ratios_rise_to_the_share_by_even_parts_of_what_is_left(share, count):
    ratios = growing(share, count)
    assert len(ratios) == count
    assert ratios[-1] == share
    left = [1.0, *(1 - ratio for ratio in ratios)]
    parts = [after / before for before, after in itertools.pairwise(left)]
    assert parts == pytest.approx([parts[0]] * count)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize(("pattern", "share"), [("unstructured", 0.6), ("2:4", 0.5), ("4x4", 0.5)])
def test_the_pattern_is_met_however_many_ratios_lead_to_it(name, pattern, share):
    pruned(Solver(name=name, ratios=3), pattern, share)
    pruned(Solver(name=name, ratios=3, refit=10, swaps=0 if pattern == "4x4" else 2), pattern, share)


def test_with_a_refit_growing_ratios_find_better_unstructured_masks():
    once, grown = (pruned(Solver(name="sparsegpt", refit=20, ratios=ratios), "unstructured", 0.6) for ratios in (1, 4))
    assert grown < 0.95 * once
