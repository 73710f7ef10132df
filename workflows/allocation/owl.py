"""Outlier-Weighed Layerwise sparsity (OWL; Yin et al. 2023, arXiv 2310.05175): linears with more outliers give less."""

import numpy as np

from workflows.allocation.shares import bounds, exact


def owl(outliers: np.ndarray, sizes: np.ndarray, target: float, width: float) -> np.ndarray:
    """Shares that fall with the share of outliers, on a straight line from `target + width` to `target - width`.

    Then all are shifted so that the target is met. The paper bounds a layer's share by the target ± λ; its published
    code does not bound it after the shift. Here it is: most linears have few outliers, and without a bound a few that
    have many would give up to 2λ less.

    Args:
        outliers: [units], share of a unit's Wanda scores above M times their mean (the paper takes M = 5 or 7).
        sizes: [units] int64, parameters of each unit.
        target: share of all parameters to remove.
        width: λ, how far a unit's share may be from the target.

    Returns:
        Shares [units] fp64; the target for all when they have as many outliers as each other.

    Raises:
        ValueError: outliers are not finite, or the target is more than a linear may give.
    """
    if not np.isfinite(outliers).all():
        raise ValueError("shares of outliers must be finite; score the model again")
    spread = np.ptp(outliers)
    ranks = (outliers - outliers.min()) / spread if spread else np.full(len(outliers), 0.5)
    return exact(target + width * (1 - 2 * ranks), sizes, target, *bounds(target, width))
