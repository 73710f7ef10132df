"""How values that are not negative are spread: quantiles and sums of the lowest, without sorting.

The bits of a positive fp32 number, read as an integer, rise with the number. So its highest bits are a bin, and bins
are 1/256 of a value apart at every magnitude. Counting is linear in time and bounded in memory where sorting is not
(a linear of a large model has a billion weights), and the spreads of parts add up to that of the whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DROPPED = 15  # lowest bits of an fp32 that a bin does not see; sign (always 0), exponent and 8 bits of fraction stay
BINS = 1 << (32 - 1 - DROPPED)
AT_ONCE = 1 << 24  # values counted at once


@dataclass(frozen=True)
class Spread:
    """Some values in bins of rising value; only bins with values are kept.

    Attributes:
        bins: number of each bin, rising, int64.
        counts: values in each, int64.
        sums: their sums, fp64.
        smallest, largest: of all values; NaN when there are none.
    """

    bins: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Tensor) -> "Spread":
        """The spread of a tensor's values. Counted on the CPU: a GPU sums in whatever order its threads come.

        Args:
            values: any shape, fp32.

        Raises:
            ValueError: a value is negative or not finite.
        """
        flat = values.flatten()
        if not flat.numel():
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.nan, np.nan)
        smallest, largest = (one.item() for one in flat.aminmax())
        if not (smallest >= 0 and largest < np.inf):
            raise ValueError(
                f"values from {smallest:g} to {largest:g} have no spread: they must be finite, none below 0"
            )
        counts, sums = torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.float64)
        for part in map(Tensor.cpu, flat.split(AT_ONCE)):
            numbers = (part.abs().view(torch.int32) >> DROPPED).long()  # abs: -0.0 is 0.0
            counts += torch.bincount(numbers, minlength=BINS)
            sums += torch.bincount(numbers, part.double(), minlength=BINS)
        bins = counts.nonzero().flatten()
        return cls(bins.numpy(), counts[bins].numpy(), sums[bins].numpy(), smallest, largest)

    @classmethod
    def joined(cls, parts: Iterable["Spread"]) -> "Spread":
        """The spread of all values of the parts."""
        parts = [part for part in parts if part.count]
        if not parts:
            return cls.of(torch.zeros(0))
        bins, places = np.unique(np.concatenate([part.bins for part in parts]), return_inverse=True)
        counts, sums = np.zeros(len(bins), np.int64), np.zeros(len(bins))
        np.add.at(counts, places, np.concatenate([part.counts for part in parts]))
        np.add.at(sums, places, np.concatenate([part.sums for part in parts]))
        return cls(bins, counts, sums, min(part.smallest for part in parts), max(part.largest for part in parts))

    @property
    def count(self) -> int:
        """How many values there are."""
        return int(self.counts.sum())

    @property
    def total(self) -> float:
        """Their sum."""
        return float(self.sums.sum())

    def quantiles(self, shares: Sequence[float]) -> np.ndarray:
        """Values below which these shares lie, fp64; exact at 0 and 1, else within 1/256 of themselves."""
        if not self.count:
            return np.full(len(shares), np.nan)
        ranks = np.asarray(shares) * (self.count - 1)
        places = np.searchsorted(self.counts.cumsum(), ranks, side="right").clip(max=len(self.bins) - 1)
        means = (self.sums / self.counts)[places]  # of the values in the bin
        found = means.clip(self.smallest, self.largest)
        found = np.where(ranks == 0, self.smallest, found)
        return np.where(np.asarray(shares) == 1, self.largest, found)

    def lowest(self, shares: Sequence[float]) -> np.ndarray:
        """Sums of the lowest values, as many as each share says, fp64; a bin that is cut gives its mean for each."""
        if not self.count:
            return np.zeros(len(shares))
        known = np.concatenate([[0], self.counts.cumsum()])
        return np.interp(np.asarray(shares) * self.count, known, np.concatenate([[0.0], self.sums.cumsum()]))

    def share_below(self, threshold: float) -> float:
        """Which share of the values lies below a threshold, within the width of its bin."""
        if not self.count or threshold <= self.smallest:
            return 0.0
        if threshold > self.largest:
            return 1.0
        own = int(np.float32(threshold).view(np.int32)) >> DROPPED
        return float(self.counts[self.bins < own].sum() / self.count)
