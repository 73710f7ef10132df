"""Solvers against slow references in double precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.pruning.patterns import achieved, pruned_count, verify
from workflows.pruning.solvers import SOLVERS
from workflows.scoring.gram import add_inputs, damped, mirror

DAMPING = 0.01
PATTERNS = [
    ("unstructured", 0.5),
    ("unstructured", 0.37),
    ("2:4", 0.5),
    ("4:8", 0.5),
    ("3:5", 0.4),
    ("2:4", 0.3),
]


def problem(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Gram of correlated inputs, as linears of a language model see them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    gram = torch.zeros(cols, cols)
    add_inputs(gram, torch.randn(4 * cols, cols, generator=generator) @ mixing)
    return torch.randn(rows, cols, generator=generator), mirror(gram)


def solve(name: str, weight: torch.Tensor, gram: torch.Tensor, pattern: str, sparsity: float) -> torch.Tensor:
    return SOLVERS[name].solve(weight, SOLVERS[name].prepare(gram, DAMPING), pattern, sparsity)


def squared_error(change: torch.Tensor, gram: torch.Tensor) -> float:
    change = change.double()
    return float(((change @ gram.double()) * change).sum())


def exact_refit(weight: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Row by row the least-squares optimum on a fixed mask: w_K = w H_:K (H_KK)⁻¹."""
    weight, hessian = weight.double(), hessian.double()
    refitted = torch.zeros_like(weight)
    for row, kept in enumerate(keep):
        if kept.any():
            refitted[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row])
    return refitted


def columnwise_reference(weight: torch.Tensor, hessian: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """SparseGPT's repair for a given mask, straight from its definition.

    At column i all columns before it are fixed: the inverse of what is left of H says how the columns from
    i on best make up for setting w_i to zero. No blocks, no factor, one fresh inverse per column.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    for i in range(weight.shape[1]):
        left = torch.linalg.inv(hessian[i:, i:])
        step = weight[:, i] * dropped[:, i] / left[0, 0]
        weight[:, i:] -= step[:, None] * left[0]
    return weight.masked_fill(dropped, 0)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("name", SOLVERS)
def test_counts_are_exact_and_patterns_valid(name: str, pattern: str, sparsity: float) -> None:
    weight, gram = problem(6, 280)
    before = weight.clone()
    pruned = solve(name, weight, gram, pattern, sparsity)
    verify(pruned, pattern, sparsity)
    assert int((pruned == 0).sum()) == pruned_count(6, 280, sparsity, pattern)
    assert torch.equal(weight, before)
    if name == "wanda":
        zeros = (pruned == 0).sum(1)
        assert int(zeros.max() - zeros.min()) <= 1


@pytest.mark.parametrize(("pattern", "first", "second"), [("unstructured", 0.2, 0.55), ("2:4", 0.3, 0.5)])
@pytest.mark.parametrize("name", SOLVERS)
def test_second_stage_adds_to_the_zeros_of_the_first(name: str, pattern: str, first: float, second: float) -> None:
    weight, gram = problem(5, 300)
    once = solve(name, weight, gram, pattern, first)
    twice = solve(name, once, gram, pattern, second)
    assert int((twice == 0).sum()) == pruned_count(5, 300, second, pattern)
    assert (twice[once == 0] == 0).all()
    verify(twice, pattern, second)


@pytest.mark.parametrize("name", ["sparsegpt", "admm"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    zero_share=st.floats(0, 0.9),
    sparsity=st.floats(0, 1),
    pattern=st.sampled_from(["unstructured", "2:4"]),
)
def test_zeros_are_never_revived_wherever_they_are(
    name: str, seed: int, zero_share: float, sparsity: float, pattern: str
) -> None:
    weight, gram = problem(3, 160, seed)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < zero_share] = 0
    sparsity = sparsity / 2 if pattern == "2:4" else sparsity
    pruned = solve(name, weight, gram, pattern, sparsity)
    assert (pruned[weight == 0] == 0).all()
    zeros, claimed = int((pruned == 0).sum()), pruned_count(3, 160, sparsity, pattern)
    assert zeros >= claimed
    if pattern == "unstructured":
        assert zeros == max(claimed, int((weight == 0).sum()))


def test_magnitude_drops_the_smallest_of_the_chunk_and_repairs_nothing() -> None:
    weight = torch.tensor([[1.0, -0.1, 3.0, 0.2], [-0.3, 5.0, 6.0, 7.0]])
    pruned = solve("magnitude", weight, torch.eye(4), "unstructured", 3 / 8)
    assert pruned.tolist() == [[1, 0, 3, 0], [0, 5, 6, 7]]


def test_wanda_weighs_by_the_inputs_norm_within_each_row() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    squares = torch.tensor([100.0, 1.0, 4.0, 0.0])  # scores 10, 2, 6, 0
    for statistic in (squares, squares.diag()):
        pruned = solve("wanda", weight, statistic, "unstructured", 0.5)
        assert torch.equal(pruned, weight * torch.tensor([1, 0, 1, 0]))


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_sparsegpt_is_the_columnwise_algorithm(pattern: str, sparsity: float) -> None:
    weight, gram = problem(4, 280)
    pruned = solve("sparsegpt", weight, gram, pattern, sparsity)
    expected = columnwise_reference(weight, damped(gram, DAMPING), pruned == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


def test_sparsegpt_chooses_n_m_groups_after_the_repairs_before_them() -> None:
    """The first group as the scores say; the second by its weights as the first one's repair left them."""
    weight, gram = problem(64, 8, seed=3)
    hessian = damped(gram, DAMPING).double()
    pruned = solve("sparsegpt", weight, gram, "2:4", 0.5)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    first = ((weight.double() / factor.diagonal()) ** 2)[:, :4]
    dropped = torch.zeros(64, 8, dtype=torch.bool)
    dropped[:, :4].scatter_(1, first.argsort(1)[:, :2], True)
    repaired = columnwise_reference(weight, hessian, dropped)
    second = ((repaired / factor.diagonal()) ** 2)[:, 4:]
    dropped[:, 4:].scatter_(1, second.argsort(1)[:, :2], True)
    assert torch.equal(pruned == 0, dropped)
    naive = ((weight.double() / factor.diagonal()) ** 2)[:, 4:].argsort(1)[:, :2].sort(1).values
    assert not torch.equal(naive, second.argsort(1)[:, :2].sort(1).values), "the case shows nothing"


def test_sparsegpt_is_exact_least_squares_when_the_first_columns_go() -> None:
    """All repairs then go to columns that are still free, so the order of elimination costs nothing."""
    weight, gram = problem(5, 128)
    weight[:, :40] *= 1e-3
    weight[:, 40:] += weight[:, 40:].sign()
    pruned = solve("sparsegpt", weight, gram, "unstructured", 40 / 128)
    keep = torch.ones(5, 128, dtype=torch.bool)
    keep[:, :40] = False
    assert torch.equal(pruned != 0, keep)
    expected = exact_refit(weight, damped(gram, DAMPING), keep)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("column", [0, 7, 31])
def test_sparsegpt_repairs_only_to_the_right(column: int) -> None:
    """What the algorithm gives up beside the optimum: columns before the dropped one stay as they were."""
    weight, gram = problem(5, 32)
    weight += weight.sign()
    weight[:, column] = 1e-3
    pruned = solve("sparsegpt", weight, gram, "unstructured", 1 / 32)
    assert torch.equal(pruned[:, :column], weight[:, :column])
    hessian = damped(gram, DAMPING).double()[column:, column:]
    keep = torch.ones(5, 32 - column, dtype=torch.bool)
    keep[:, 0] = False
    expected = exact_refit(weight[:, column:], hessian, keep)
    torch.testing.assert_close(pruned[:, column:].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_repair_lies_between_none_and_the_exact_refit(pattern: str, sparsity: float, seed: int) -> None:
    weight, gram = problem(8, 280, seed)
    hessian = damped(gram, DAMPING)
    pruned = solve("sparsegpt", weight, gram, pattern, sparsity)
    keep = pruned != 0
    repaired = squared_error(pruned - weight, hessian)
    unrepaired = squared_error(weight * keep - weight, hessian)
    best = squared_error(exact_refit(weight, hessian, keep) - weight.double(), hessian)
    assert best <= repaired * (1 + 1e-5)
    assert repaired < unrepaired
    assert repaired < 2 * best


def test_better_statistics_give_less_error() -> None:
    weight, gram = problem(32, 256)
    gram_scale = torch.logspace(-1, 1, 256)
    gram = gram * gram_scale * gram_scale[:, None]
    errors = [squared_error(solve(name, weight, gram, "2:4", 0.5) - weight, gram) for name in SOLVERS]
    assert errors == sorted(errors, reverse=True), dict(zip(SOLVERS, errors, strict=True))


def test_dead_inputs_are_zeroed_and_repair_nothing() -> None:
    weight, gram = problem(6, 140)
    dead = [0, 5, 129]
    gram[dead, :] = 0
    gram[:, dead] = 0
    alive = [i for i in range(140) if i not in dead]
    pruned = solve("sparsegpt", weight, gram, "unstructured", 0.4)
    assert (pruned[:, dead] == 0).all()
    assert int((pruned == 0).sum()) == pruned_count(6, 140, 0.4)
    hessian = damped(gram, DAMPING)[alive][:, alive]
    expected = columnwise_reference(weight[:, alive], hessian, pruned[:, alive] == 0)
    torch.testing.assert_close(pruned[:, alive].double(), expected, rtol=1e-3, atol=1e-4)


def test_all_inputs_dead_leaves_zeros() -> None:
    assert achieved(solve("sparsegpt", torch.ones(2, 8), torch.zeros(8, 8), "2:4", 0.5)) == 1


def test_independent_inputs_need_no_repair() -> None:
    weight, _ = problem(4, 64)
    pruned = solve("sparsegpt", weight, torch.eye(64), "unstructured", 0.5)
    torch.testing.assert_close(pruned, solve("magnitude", weight, torch.eye(64), "unstructured", 0.5))


@pytest.mark.parametrize("name", SOLVERS)
def test_row_chunks_solved_alone_or_twice_are_the_same_bits(name: str) -> None:
    weight, gram = problem(32, 192)
    prepared = SOLVERS[name].prepare(gram, DAMPING)
    chunk = weight[16:]
    once = SOLVERS[name].solve(chunk, prepared, "2:4", 0.5)
    assert torch.equal(once, SOLVERS[name].solve(chunk.clone(), prepared, "2:4", 0.5))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_damaged_weights_are_an_error(pattern: str, value: float) -> None:
    weight, gram = problem(2, 8)
    weight[0, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve("sparsegpt", weight, gram, pattern, 0.5)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "admm"])
def test_damaged_statistics_are_an_error(name: str) -> None:
    gram = torch.eye(4)
    gram[1, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        SOLVERS[name].prepare(gram, DAMPING)


def test_what_solvers_need() -> None:
    assert {name: solver.statistic for name, solver in SOLVERS.items()} == {
        "magnitude": "none",
        "wanda": "diagonal",
        "sparsegpt": "gram",
        "admm": "gram",
    }
    assert SOLVERS["magnitude"].prepare(torch.eye(2), DAMPING) == ()


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS)
def test_sparsegpt_on_a_gpu_is_the_columnwise_algorithm(pattern: str, sparsity: float) -> None:
    weight, gram = problem(4, 280)
    pruned = solve("sparsegpt", weight.cuda(), gram.cuda(), pattern, sparsity).cpu()
    verify(pruned, pattern, sparsity)
    expected = columnwise_reference(weight, damped(gram, DAMPING), pruned == 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)
