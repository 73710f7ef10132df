"""Composite saliency against the real increase of a loss, and spreads against sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from workflows.scoring.gradients import block_backward
from workflows.scoring.gram import damped
from workflows.scoring.saliency import composite, inverse_diagonal
from workflows.scoring.spread import Spread

TOKENS, INPUTS, OUTPUTS = 400, 6, 3
TINY = 1e-9  # damping so small that H is G


def test_composite_is_the_real_loss_when_a_weight_goes_and_its_row_is_repaired():
    """A linear whose loss is quadratic: L = ½ Σ_t Σ_o c_o (y_o − target)², W at its minimum, E[(∂L/∂y_o)²] = c_o."""
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(INPUTS, INPUTS, generator=random)
    x = torch.randn(TOKENS, INPUTS, generator=random) @ mixed  # inputs that depend on each other
    weight = torch.randn(OUTPUTS, INPUTS, generator=random)
    curvature = torch.tensor([0.3, 2.0, 17.0])
    noise = torch.randn(TOKENS, OUTPUTS, generator=random)
    noise -= x @ torch.linalg.lstsq(x, noise).solution  # so that W is the minimum
    target = x @ weight.T + noise / noise.square().mean(0).sqrt() / curvature.sqrt()

    linear = nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    slope = curvature * (x @ weight.T - target)  # ∂L/∂y
    _, squares = block_backward(linear, {"it": linear}, x[None], slope[None])
    gram = x.T @ x
    found = composite(weight, squares["it"] / TOKENS, inverse_diagonal(gram, TINY))

    def loss(w: torch.Tensor, o: int) -> float:
        return (0.5 * curvature[o] * (x @ w - target[:, o]).double().square().sum()).item()

    for o in range(OUTPUTS):
        for i in range(INPUTS):
            kept = [j for j in range(INPUTS) if j != i]
            repaired = torch.zeros(INPUTS)
            repaired[kept] = torch.linalg.lstsq(x[:, kept], target[:, [o]]).solution[:, 0]
            increase = loss(repaired, o) - loss(weight[o], o)
            assert found[o, i].item() == pytest.approx(increase, rel=2e-3), (o, i)


def test_inverse_diagonal_is_that_of_the_inverse():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    x[:, 3] = 0
    found = inverse_diagonal(x.T @ x, 0.01)
    wanted = torch.linalg.inv(damped(x.T @ x, 0.01)).diagonal()
    alive = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(found[alive], wanted[alive])
    weight = torch.ones(2, 8)
    scores = composite(weight, torch.ones(2), found)
    assert (scores[:, 3] == 0).all(), "an input that is always zero is worth nothing"
    assert (scores[:, alive] > 0).all()
    assert (weight == 1).all(), "the weights were changed"


magnitudes = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=60)


@settings(deadline=None)
@given(magnitudes, st.integers(0, 60))
def test_spreads_agree_with_sorting_and_add_up(values, cut):
    tensor = torch.tensor(values, dtype=torch.float32)
    parts = [Spread.of(tensor[:cut]), Spread.of(tensor[cut:])]
    spread, joined = Spread.of(tensor), Spread.joined(parts)
    ordered = np.sort(tensor.double().numpy())
    assert joined.count == spread.count == len(values)
    assert (joined.bins == spread.bins).all()
    assert (joined.counts == spread.counts).all()
    np.testing.assert_allclose(joined.sums, spread.sums, rtol=1e-12)
    assert spread.total == pytest.approx(ordered.sum(), rel=1e-12)

    assert (spread.quantiles([0, 1]) == ordered[[0, -1]]).all()
    shares = [0.1, 0.5, 0.9]
    wanted = ordered[[int(share * (len(values) - 1)) for share in shares]]
    np.testing.assert_allclose(spread.quantiles(shares), wanted, rtol=1 / 256, atol=2.0**-126)

    rough, halves = 1 + 1 / 256, len(values) / 2
    low, high = (ordered[: int(round_(halves))].sum() for round_ in (np.floor, np.ceil))
    nothing = len(values) * 2.0**-126  # below that bins are wide
    assert low / rough - nothing <= spread.lowest([0.5])[0] <= high * rough + nothing
    assert spread.lowest([1.0])[0] == pytest.approx(spread.total)
    assert spread.share_below(0.0) == 0
    assert spread.share_below(2.0**101) == 1


def test_sums_of_the_lowest_and_shares_below_a_threshold():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(2)) ** 4
    spread, ordered = Spread.of(values), values.double().sort().values
    shares = np.array([0.1, 0.5, 0.9])
    wanted = [ordered[: int(share * 10_000)].sum().item() for share in shares]
    np.testing.assert_allclose(spread.lowest(shares), wanted, rtol=1 / 256)
    for threshold in (1e-6, 0.01, 0.5):
        assert spread.share_below(threshold) == pytest.approx((values < threshold).double().mean().item(), abs=2e-3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -1.0])
def test_what_has_no_spread_is_refused(broken):
    with pytest.raises(ValueError, match="no spread"):
        Spread.of(torch.tensor([1.0, broken, 2.0]))
