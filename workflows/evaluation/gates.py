"""Whether a stage is good enough: increase of perplexity over the dense model, on all data and the worst slice."""

import numpy as np
from pydantic import BaseModel, ConfigDict

from workflows.evaluation.quality import LARGEST_MEAN, Quality, resamples
from workflows.recipe import Gates

TOLD_IN_PERCENT = 10.0  # a share: up to 1000 %


class Verdict(BaseModel):
    """A gate's decision and its numbers; increases are shares (0.1 is 10 %), None when the model is broken."""

    model_config = ConfigDict(frozen=True)

    passed: bool
    increase: float | None
    interval: tuple[float, float] | None
    worst_slice: str | None
    worst_increase: float | None
    reasons: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The decision as one sentence."""
        return "; ".join(self.reasons)


def judge(dense: Quality, candidate: Quality, gates: Gates, seed: int = 0) -> Verdict:
    """Holds a model against its gates.

    The decision is taken on the measured increase; its interval is a paired bootstrap over windows, since both models
    saw the same ones. A slice on which the model is broken fails, however good the rest is.
    """
    assert [(one.slice, one.tokens) for one in dense.windows] == [
        (one.slice, one.tokens) for one in candidate.windows
    ], "both models are judged on the same windows"
    overall = increase(dense, candidate)
    if overall is None:
        return broken("the model's losses are not finite: it is broken")
    by_slice = {}
    for name in dense.slices:
        risen = increase(dense.of_slice(name), candidate.of_slice(name))
        if risen is None:
            return broken(f"the losses on slice {name} are not finite: the model is broken there", name)
        by_slice[name] = risen
    worst = max(by_slice, key=lambda name: by_slice[name])
    reasons = [compared("perplexity", overall, gates.perplexity_increase)]
    if len(by_slice) > 1:
        reasons.append(compared(f"worst slice {worst}", by_slice[worst], gates.worst_slice_increase))
    passed = overall <= gates.perplexity_increase and by_slice[worst] <= gates.worst_slice_increase
    return Verdict(
        passed=passed,
        increase=overall,
        interval=paired_interval(dense, candidate, seed),
        worst_slice=worst,
        worst_increase=by_slice[worst],
        reasons=tuple(reasons),
    )


def broken(reason: str, worst_slice: str | None = None) -> Verdict:
    """The verdict on a model that has no perplexity."""
    return Verdict(
        passed=False, increase=None, interval=None, worst_slice=worst_slice, worst_increase=None, reasons=(reason,)
    )


def increase(dense: Quality, candidate: Quality) -> float | None:
    """Relative increase of perplexity; None when one of them is not finite."""
    before, after = dense.perplexity, candidate.perplexity
    return None if before is None or after is None else after / before - 1


def paired_interval(dense: Quality, candidate: Quality, seed: int) -> tuple[float, float]:
    """95 % interval of the increase, both models resampled on the same windows."""
    (loss, tokens), (other, _) = dense.sums(), candidate.sums()
    picks = resamples(len(loss), seed)
    ratios = np.exp(np.minimum((other[picks] - loss[picks]).sum(1) / tokens[picks].sum(1), LARGEST_MEAN)) - 1
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def compared(what: str, value: float, limit: float) -> str:
    """Such as "perplexity rose 14.2 % (limit +10 %)"; a rise that no percentage makes clear is told in times."""
    if value > TOLD_IN_PERCENT:
        moved = f"rose to {value + 1:.3g} times the dense model's"
    else:
        moved = f"rose {value:.1%}" if value >= 0 else f"fell {-value:.1%}"
    return f"{what} {moved} (limit +{limit:.0%})".replace("%", " %")
