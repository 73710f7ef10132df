"""Shares of parameters to remove, one for each unit, that together remove the target share.

A unit is one linear of one block. All allocations end here, so that they meet the target in the same way.
"""

import numpy as np

MOST = 0.98  # no linear gives more: of what little is left, hardly any output is whole
ROUNDING = 1e-9  # by which a mean of equal bounds may miss them


def bounds(target: float, width: float) -> tuple[float, float]:
    """Lowest and highest share of a unit: the target, `width` less and `width` more, within 0 and `MOST`."""
    return max(0.0, target - width), min(MOST, target + width)


def exact(
    shares: np.ndarray, sizes: np.ndarray, target: float, low: float | np.ndarray, high: float | np.ndarray
) -> np.ndarray:
    """The shares nearest to the given ones, by squares weighted with the sizes, that remove the target share.

    They are the given ones plus one shift for all, clipped to the bounds (water-filling).

    Args:
        shares: [units] fp64, finite; they may lie outside of the bounds.
        sizes: [units] int64, parameters of each unit, all above 0.
        target: share of all parameters to remove.
        low: lowest share of every unit, or of each [units].
        high: highest share, likewise.

    Returns:
        Shares [units] fp64 in [low, high], whose mean, weighted with the sizes, is the target.

    Raises:
        ValueError: the target lies outside of the bounds.
    """
    assert (sizes > 0).all()
    assert np.isfinite(shares).all()
    least, most = (float(np.average(np.broadcast_to(one, shares.shape), weights=sizes)) for one in (low, high))
    if not least - ROUNDING <= target <= most + ROUNDING:
        raise ValueError(
            f"a share of {target:g} cannot be met by linears that give from {least:g} to {most:g} together; "
            "choose a target between these"
        )
    # What goes rises with the shift in straight pieces: a unit takes part from where it leaves `low` to `high`.
    shifts = np.concatenate([low - shares, high - shares])
    order = np.argsort(shifts, kind="stable")
    shifts = shifts[order]
    growing = np.concatenate([sizes, -sizes])[order].cumsum()[:-1]  # parameters of the units between their bounds
    removed = least * sizes.sum() + np.concatenate([[0.0], (growing * np.diff(shifts)).cumsum()])
    shift = np.interp(target * sizes.sum(), removed, shifts)
    return np.clip(shares + shift, low, high)
