"""One threshold for the whole model on a saliency that is in units of loss: whatever costs less than it goes."""

import numpy as np

from workflows.allocation.shares import bounds, exact

HALVINGS = 64  # of the range of log t, which spans less than 2¹¹: what is left is less than fp64 tells apart


def composite(curves: np.ndarray, sizes: np.ndarray, target: float, width: float) -> np.ndarray:
    """The share of each unit's weights whose saliency is below the threshold t at which the target is met.

    Where many weights share the very saliency t (dead inputs: 0), no t meets the target. These weights cost the same
    wherever they lie, so every unit gives the same part of its own.

    Args:
        curves: [units, points] fp64, rising: the saliency below which 0 %, …, 100 % of a unit's weights lie, in equal
            steps of share. Between two points the share is taken as linear in the saliency.
        sizes: [units] int64, parameters of each unit.
        target: share of all parameters to remove.
        width: how far a unit's share may be from the target.

    Returns:
        Shares [units] fp64.

    Raises:
        ValueError: a saliency is negative, not finite or falls, or the target is more than a linear may give.
    """
    if not np.isfinite(curves).all() or (curves < 0).any() or (np.diff(curves) < 0).any():
        raise ValueError("curves of saliency must be finite, not negative and rising; score the model again")
    low, high = bounds(target, width)
    points = np.linspace(0, 1, curves.shape[1])

    def below(threshold: float) -> np.ndarray:
        """Shares of saliency up to a threshold; `interp` takes the last point of a flat stretch."""
        return np.clip([np.interp(threshold, curve, points) for curve in curves], low, high)

    def mean(shares: np.ndarray) -> float:
        return float(sizes @ shares / sizes.sum())

    # `lower` removes less than the target and `upper` no less, for thresholds that come ever closer.
    lower, upper = np.full(len(curves), low), below(0.0)
    if mean(upper) < target:
        lower, upper = upper, np.full(len(curves), high)
        positive = curves[curves > 0]
        # From below the smallest: its own weights may be many, and must be on one side.
        start, end = (np.log(positive.min()) - 1, np.log(positive.max())) if len(positive) else (0.0, 0.0)
        for _ in range(HALVINGS):
            middle = (start + end) / 2
            shares = below(np.exp(middle))
            if mean(shares) < target:
                start, lower = middle, shares
            else:
                end, upper = middle, shares
    part = np.interp(target, [mean(lower), mean(upper)], [0, 1])
    return exact(lower + part * (upper - lower), sizes, target, low, high)
