"""The steps of an evolutionary search over levels of sparsity (EvoPress; Sieberling et al. 2024, arXiv 2410.14649).

Every generation, children of the best allocation so far switch levels between units so that the total stays; the best
of them and their parent is the next parent.
"""

import numpy as np

TOLERANCE = 0.001  # a child removes the target share within 0.1 point
MOST_SWITCHES = 3  # the smaller of two draws up to this, as in the authors' code: mostly one
TRIES = 50  # for each child, to find one that is new


def offspring(
    parent: np.ndarray, levels: np.ndarray, sizes: np.ndarray, target: float, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Children that differ from their parent by a few switches of levels.

    Args:
        parent: [units] int64, indices of levels.
        levels: [levels] fp64, rising shares.
        sizes: [units] int64, parameters of each unit.
        target: share of all parameters to remove; not that of the parent, or shares would drift over generations.
        count: children wanted.
        rng: source of all chance.

    Returns:
        Indices of levels [count, units] int64; repeated when there are too few different ones.

    Raises:
        ValueError: no switch of levels was found that removes the target.
    """
    known, children = {parent.tobytes()}, []
    for _ in range(TRIES * count):
        child = _switched(parent, levels, sizes, target, rng)
        if child.tobytes() not in known and abs(_excess(child, levels, sizes, target)) <= TOLERANCE * sizes.sum():
            known.add(child.tobytes())
            children.append(child)
        if len(children) == count:
            break
    if not children:
        raise ValueError(
            f"no switch of levels between {len(sizes)} linears still removes {target:g}; measure levels closer together"
        )
    return np.resize(children, (count, len(parent)))


def survivor(fitness: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The candidate that is next parent. With the parent as first candidate, a generation never makes things worse.

    Args:
        fitness: [candidates], lower is better, such as the KL divergence from the dense model; NaN is the worst.
        candidates: [candidates, units] int64.

    Returns:
        The best one [units]; of equals the first.
    """
    return candidates[np.where(np.isnan(fitness), np.inf, fitness).argmin()]


def _excess(child: np.ndarray, levels: np.ndarray, sizes: np.ndarray, target: float) -> float:
    """Parameters removed above the target."""
    return float(sizes @ levels[child] - target * sizes.sum())


def _switched(
    parent: np.ndarray, levels: np.ndarray, sizes: np.ndarray, target: float, rng: np.random.Generator
) -> np.ndarray:
    """A copy in which a few units went one level up or down, and for each some others the other way, to make up for it.

    The others are drawn from those that bring the total closer to the target, until there are none.
    """
    child, free = parent.copy(), np.ones(len(parent), bool)  # no unit moves twice
    for _ in range(rng.integers(1, MOST_SWITCHES, 2, endpoint=True).min()):
        way = step = int(rng.choice((-1, 1)))  # both, so that whatever one switch did another can undo
        limit = np.inf
        while True:
            moved = (child + step).clip(0, len(levels) - 1)
            changes = sizes * np.abs(levels[moved] - levels[child])
            able = np.flatnonzero(free & (changes > 0) & (changes < limit))
            if not len(able):
                break
            unit = rng.choice(able)
            child[unit], free[unit] = moved[unit], False
            over = way * _excess(child, levels, sizes, target)
            limit, step = 2 * over, -way
    return child
