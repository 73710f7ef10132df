"""Everything that happens to some rows of a linear: its solver, at growing ratios, the refit, and swaps."""

from torch import Tensor

from workflows.pruning import patterns
from workflows.pruning.refit import refit
from workflows.pruning.solvers import SOLVERS
from workflows.pruning.swaps import swap
from workflows.recipe import Solver


def prune_rows(
    weight: Tensor, prepared: tuple[Tensor, ...], hessian: Tensor | None, pattern: str, share: float, how: Solver
) -> Tensor:
    """Pruned and repaired rows, as a new tensor.

    One Gram serves all ratios: what a linear reads does not depend on its own weights. Repairs always lead back to the
    dense rows, not to those of the ratio before.

    Args:
        weight: dense rows [rows, in] fp32.
        prepared: what the solver's `prepare` gave.
        hessian: damped Gram [in, in]; needed where `how.goes_on`.
        pattern: as in the recipe.
        share: of the weights that goes.
        how: which solver, and what follows it.
    """
    solved = weight
    for ratio in growing(share, how.ratios):
        solved = SOLVERS[how.name].solve(solved, prepared, pattern, ratio)
        if hessian is not None:
            solved = refit(weight, solved, hessian, how.refit)
    if hessian is not None and how.swaps:
        solved = swap(weight, solved, hessian, patterns.parse(pattern), how.swaps)
    return solved


def growing(share: float, count: int) -> list[float]:
    """`count` ratios up to `share`; each leaves the same part of what the one before left."""
    return [1 - (1 - share) ** (number / count) for number in range(1, count)] + [share]
