"""Allocations meet the target within their bounds; against sorting, brute force and greedy choice where these can be had."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from workflows.allocation.composite import composite
from workflows.allocation.evolution import TOLERANCE, offspring, survivor
from workflows.allocation.knapsack import BINS, FINENESS, cheapest, measured
from workflows.allocation.owl import owl
from workflows.allocation.shares import MOST, bounds, exact

NOISE = 1e-12  # of fp64
units = st.integers(1, 12)
targets = st.floats(0.02, 0.95)
widths = st.floats(0, 1)


def sizes_of(count: int, most: int = 10**10):
    return arrays(np.int64, count, elements=st.integers(1, most))


def assert_meets(shares: np.ndarray, sizes: np.ndarray, target: float, low: float, high: float) -> None:
    assert shares.dtype == np.float64
    assert sizes @ shares / sizes.sum() == pytest.approx(target, abs=1e-9)
    assert low <= shares.min() <= shares.max() <= high


@settings(deadline=None)
@given(st.data(), units, targets, widths)
def test_exact_shares_meet_the_target_and_are_the_nearest(data, count, target, width):
    sizes = data.draw(sizes_of(count))
    shares = data.draw(arrays(float, count, elements=st.floats(-2, 2)))
    low, high = bounds(target, width)
    found = exact(shares, sizes, target, low, high)
    assert_meets(found, sizes, target, low, high)
    # Nearest: who is not at a bound is shifted as far as the others, and a bound holds back only who would pass it.
    shifts = found - shares
    for i, j in product(range(count), repeat=2):
        if found[i] > low and found[j] < high:
            assert shifts[i] <= shifts[j] + 1e-9
    np.testing.assert_allclose(exact(found, sizes, target, low, high), found, atol=1e-9)


def test_bounds_stay_among_shares_and_a_target_outside_is_refused():
    assert bounds(0.5, 0.125) == (0.375, 0.625)
    assert bounds(0.1, 0.2)[0] == 0
    assert bounds(0.9, 0.2)[1] == MOST
    for outside in (0.39, 0.61):
        with pytest.raises(ValueError, match=r"from 0\.4 to 0\.6"):
            exact(np.full(2, 0.5), np.array([1, 2]), outside, 0.4, 0.6)
    for at_bound in (0.4, 0.6):
        found = exact(np.array([0.0, 1.0]), np.array([1, 2]), at_bound, 0.4, 0.6)
        np.testing.assert_allclose(found, at_bound, atol=NOISE)


@settings(deadline=None)
@given(st.data(), units, targets, widths)
def test_owl_meets_the_target_and_more_outliers_never_give_more(data, count, target, width):
    sizes = data.draw(sizes_of(count))
    outliers = data.draw(arrays(float, count, elements=st.floats(0, 1)))
    shares = owl(outliers, sizes, target, width)
    assert_meets(shares, sizes, target, *bounds(target, width))
    assert (np.diff(shares[np.argsort(outliers)]) <= NOISE).all()


def test_owl_is_the_published_line_where_nothing_is_bounded():
    outliers, sizes = np.array([0.01, 0.03, 0.05]), np.array([7, 7, 7])
    np.testing.assert_allclose(owl(outliers, sizes, 0.7, 0.08), [0.78, 0.7, 0.62], atol=NOISE)
    np.testing.assert_allclose(owl(np.full(3, 0.02), np.array([1, 5, 9]), 0.7, 0.08), 0.7, atol=NOISE)
    # One unit far above the others: published, it would give 0.7 - 2 · 0.08 · 3/4.
    np.testing.assert_allclose(owl(np.array([0, 0, 0, 1.0]), np.full(4, 7), 0.7, 0.08).min(), 0.62, atol=NOISE)
    with pytest.raises(ValueError, match="finite"):
        owl(np.array([np.nan, 0]), np.array([1, 1]), 0.5, 0.1)
    with pytest.raises(ValueError, match=r"0\.99"):
        owl(outliers, sizes, 0.99, 0.1)


saliencies = st.one_of(st.just(0.0), st.sampled_from([1e-20, 1.0]), st.floats(1e-30, 1e30))


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(1, 5), targets, widths, st.floats(1, 100))
def test_composite_meets_the_target_and_higher_saliency_never_gives_more(data, count, target, width, times):
    curves = np.sort(data.draw(arrays(float, (count, 7), elements=saliencies)), axis=1)
    sizes = data.draw(sizes_of(2 * count))
    shares = composite(np.concatenate([curves, curves * times]), sizes, target, width)
    assert_meets(shares, sizes, target, *bounds(target, width))
    assert (shares[count:] <= shares[:count] + 1e-9).all()


def test_composite_takes_the_weights_of_least_saliency_of_all():
    random = np.random.default_rng(0)
    saliency = [scale * random.random(size) for scale, size in ((1.0, 3000), (2.0, 9000), (0.5, 5000))]
    sizes = np.array([len(one) for one in saliency])
    curves = np.stack([np.quantile(one, np.linspace(0, 1, 101)) for one in saliency])
    threshold = np.quantile(np.concatenate(saliency), 0.5)
    wanted = [(one < threshold).mean() for one in saliency]
    np.testing.assert_allclose(composite(curves, sizes, 0.5, 1), wanted, atol=0.002)
    np.testing.assert_allclose(composite(curves, sizes, 0.5, 0.1), [0.6, 3700 / 9000, 0.6], atol=1e-9)


def test_composite_takes_the_same_part_of_weights_of_the_same_saliency():
    points = np.linspace(0, 1, 101)
    dead = np.where(points <= 0.8, 0, points)  # 80 % of its weights are worth nothing
    half_dead = np.where(points <= 0.4, 0, points)
    dear = 1 + points
    curves, sizes = np.stack([dead, half_dead, dear]), np.array([10, 10, 10])
    np.testing.assert_allclose(composite(curves, sizes, 0.2, 1), [0.4, 0.2, 0], atol=NOISE)
    np.testing.assert_allclose(composite(curves, sizes, 0.4, 1), [0.8, 0.4, 0], atol=1e-9)
    level = np.where((points > 0.2) & (points <= 0.6), 0.2, points)  # a flat stretch that is not at 0
    found = composite(np.stack([level, points]), np.array([10, 10]), 0.3, 1)
    np.testing.assert_allclose(found, [0.4, 0.2], atol=0.001)
    np.testing.assert_allclose(composite(np.zeros((3, 101)), sizes, 0.5, 1), 0.5, atol=NOISE)
    np.testing.assert_allclose(composite(curves, sizes, 0.5, 0), 0.5, atol=NOISE)


@pytest.mark.parametrize("broken", [[0, np.nan, 1], [0, 2, 1], [-1, 0, 1]])
def test_composite_refuses_curves_that_are_none(broken):
    with pytest.raises(ValueError, match="curves"):
        composite(np.array([broken], float), np.array([4]), 0.5, 0.1)


@st.composite
def knapsacks(draw, most: int):
    """Costs of any shape, rising levels in hundredths, sizes, a target among the levels."""
    count = draw(st.integers(1, 4))
    hundredths = draw(st.lists(st.integers(0, 98), min_size=2, max_size=4, unique=True).map(sorted))
    costs = draw(arrays(float, (count, len(hundredths)), elements=st.floats(-1, 100)))
    target = draw(st.integers(hundredths[0], hundredths[-1])) / 100
    return costs, np.array(hundredths) / 100, draw(sizes_of(count, most)), target


def totals(costs: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What every choice there is costs and removes."""
    choices = np.array(list(product(range(costs.shape[1]), repeat=len(costs))))
    every = np.arange(len(costs))
    return costs[every, choices].sum(1), counts[every, choices].sum(1)


@settings(deadline=None, max_examples=50)
@given(knapsacks(most=50))
def test_measured_is_the_best_choice(problem):
    costs, levels, sizes, target = problem
    shares, chosen = measured(costs, levels, sizes, target)
    assert_meets(shares, sizes, target, levels[0], levels[-1])
    rising = np.maximum.accumulate(costs, axis=1)
    counts = sizes[:, None] * np.rint(levels * 100).astype(np.int64)
    need = sizes.sum() * round(target * 100)
    cost, removed = totals(rising, counts)
    every = np.arange(len(sizes))
    assert counts[every, chosen].sum() >= need
    assert rising[every, chosen].sum() == pytest.approx(cost[removed >= need].min(), abs=1e-9)


@settings(deadline=None)
@given(knapsacks(most=10**12), st.integers(1, 60))
def test_few_bins_cost_no_more_than_their_widths(problem, bins):
    costs, levels, sizes, target = problem
    costs = np.maximum.accumulate(costs, axis=1)
    counts = sizes[:, None] * np.rint(levels * 100).astype(np.int64)
    need = int(sizes.sum()) * round(target * 100)
    chosen = cheapest(costs, counts, need, bins)
    every = np.arange(len(sizes))
    cost, removed = totals(costs, counts)
    assert counts[every, chosen].sum() >= need
    width = -(-(need - counts[:, 0].sum()) // bins)
    wider = removed >= need + len(sizes) * width
    assert costs[every, chosen].sum() <= cost[wider].min(initial=np.inf) + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(2, 6), st.floats(0, 1))
def test_convex_costs_are_chosen_greedily(seed, count, steps, part):
    """Of units of one size, with costs that rise ever faster, the cheapest next steps are the best."""
    slopes = np.sort(np.random.default_rng(seed).random((count, steps)), axis=1)
    costs = np.concatenate([np.zeros((count, 1)), slopes.cumsum(1)], axis=1)
    levels = np.arange(steps + 1) / 10
    taken = round(part * count * steps)
    limit = np.sort(slopes, axis=None)[taken - 1] if taken else -1
    counts = np.arange(steps + 1) * np.ones((count, 1), np.int64)
    assert (cheapest(costs, counts, taken, BINS) == (slopes <= limit).sum(1)).all()
    shares, _ = measured(costs, levels, np.full(count, 1000), taken / count / 10)
    np.testing.assert_allclose(shares, levels[(slopes <= limit).sum(1)], atol=2 / FINENESS)


def test_measured_of_many_units_is_near_the_bound_and_shifts_little():
    """No choice costs less than the best of each unit at one price of a parameter, for any price (Lagrange)."""
    random = np.random.default_rng(0)
    sizes = random.integers(10**5, 10**8, 100)
    levels = np.linspace(0.3, 0.7, 9)
    costs = sizes[:, None] / 1e7 * np.exp(random.normal(size=(100, 1))) * levels**3
    costs *= np.exp(0.1 * random.normal(size=costs.shape))  # noise of the measurement
    shares, chosen = measured(costs, levels, sizes, 0.5)
    assert_meets(shares, sizes, 0.5, 0.3, 0.7)
    assert np.abs(shares - levels[chosen]).max() < 0.001
    rising = np.maximum.accumulate(costs, axis=1)
    found = np.take_along_axis(rising, chosen[:, None], 1).sum()
    counts = sizes[:, None] * levels
    prices = np.geomspace(1e-9, 1e-5, 2000)
    bound = max((rising - price * counts).min(1).sum() + price * sizes.sum() / 2 for price in prices)
    assert bound <= found <= 1.002 * bound
    assert found < 0.7 * costs[:, 4].sum(), "no better than uniform"


def test_measured_refuses_what_cannot_be():
    levels, sizes = np.array([0.4, 0.6]), np.array([5, 5])
    with pytest.raises(ValueError, match=r"remove 0\.7"):
        measured(np.zeros((2, 2)), levels, sizes, 0.7)
    with pytest.raises(ValueError, match="finite"):
        measured(np.full((2, 2), np.inf), levels, sizes, 0.5)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(10, 40), st.integers(2, 7))
def test_children_keep_the_target_and_differ(seed, count, steps):
    random = np.random.default_rng(seed)
    sizes = np.repeat(random.choice([1, 4, 14], count), 2) * 1024  # of each size two, so that a switch can be had
    levels = np.linspace(0.3, 0.7, steps)
    parent = random.integers(0, steps, 2 * count)
    parent[:4] = [0, steps - 1, steps - 1, 0]
    target = float(sizes @ levels[parent] / sizes.sum())
    start, twin = parent.copy(), np.random.default_rng(seed)
    seen = np.random.default_rng(seed)
    for _ in range(3):  # generations do not drift away
        children = offspring(parent, levels, sizes, target, 6, seen)
        assert (children == offspring(parent, levels, sizes, target, 6, twin)).all(), "not the same for the same seed"
        assert children.shape == (6, 2 * count)
        assert 0 <= children.min() <= children.max() < steps
        assert (np.abs(children - parent).max(1) == 1).all(), "the parent itself, or more than a level"
        assert len(np.unique(children, axis=0)) == 6
        assert (np.abs((sizes * levels[children]).sum(1) / sizes.sum() - target) <= TOLERANCE + NOISE).all()
        parent = children[0]
    assert (start[:4] == [0, steps - 1, steps - 1, 0]).all()


def test_children_balance_small_units_with_a_large_one_both_ways():
    sizes, levels = np.array([4, 1, 1, 1, 1]), np.array([0.4, 0.5, 0.6])
    middle = np.ones(5, int)
    children = offspring(middle, levels, sizes, 0.5, 20, np.random.default_rng(0))
    found = set(map(tuple, children))
    assert (2, 0, 0, 0, 0) in found
    assert (0, 2, 2, 2, 2) in found
    assert (1, 2, 0, 1, 1) in found
    assert sizes @ levels[children].T == pytest.approx(4), "a large step was not made up for"


def test_children_are_repeated_when_there_are_few_and_refused_when_there_are_none():
    levels, sizes = np.array([0.4, 0.6]), np.array([5, 5])
    children = offspring(np.array([0, 1]), levels, sizes, 0.5, 3, np.random.default_rng(0))
    assert children.tolist() == [[1, 0]] * 3
    with pytest.raises(ValueError, match="no switch"):
        offspring(np.array([0, 1]), levels, np.array([5, 3]), 0.475, 3, np.random.default_rng(0))
    with pytest.raises(ValueError, match="no switch"):
        offspring(np.array([0, 0]), np.array([0.5]), sizes, 0.5, 3, np.random.default_rng(0))


def test_selection_never_makes_the_search_worse():
    candidates = np.array([[0, 1], [1, 0], [1, 1]])
    assert survivor(np.array([2.0, 1.0, 1.0]), candidates).tolist() == [1, 0]
    assert survivor(np.array([1.0, np.nan, 1.0]), candidates).tolist() == [0, 1], "not the parent for a tie"
    assert survivor(np.array([np.nan, np.nan, 9.0]), candidates).tolist() == [1, 1]

    random = np.random.default_rng(0)
    sizes, levels = random.choice([1, 4, 14], 60) * 1024, np.linspace(0.3, 0.7, 9)
    weights = sizes * np.exp(random.normal(size=60)) / sizes.sum()
    parent, history = np.full(60, 4), []
    for _ in range(80):
        candidates = np.concatenate([parent[None], offspring(parent, levels, sizes, 0.5, 8, random)])
        fitness = (weights * levels[candidates] ** 3).sum(1)
        parent = survivor(fitness, candidates)
        history.append(fitness.min())
    assert (np.diff(history) <= 0).all()
    _, best = measured(weights[:, None] * levels**3, levels, sizes, 0.5)
    goal = (weights * levels[best] ** 3).sum()
    first = (weights * 0.5**3).sum()
    assert history[-1] < goal + 0.3 * (first - goal), "the search hardly found anything"
