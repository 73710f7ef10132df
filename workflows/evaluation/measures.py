"""What a model is judged by: a language model by its perplexity, a classifier by its accuracy.

A measure makes numbers of a model's scores, holds two models against each other, and says it in words.
"""

from typing import Literal, NamedTuple, Protocol

import numpy as np

from workflows.evaluation.quality import BOUNDS, LARGEST_MEAN, Quality, resamples
from workflows.recipe import ACCURACY_DROP, WORST_SLICE_DROP, Gates

TOLD_IN_PERCENT = 10.0  # a share: up to 1000 %
Name = Literal["perplexity", "accuracy"]


class Further(NamedTuple):
    """A number beside the measure: its name in tables, what it is called, its value, and how that is shown."""

    metric: str
    label: str
    value: float
    form: str


class Measure(Protocol):
    """One way to judge."""

    name: Name

    def value(self, quality: Quality) -> float | None:
        """The number; None when the model is broken or there is no window."""

    def interval(self, quality: Quality, seed: int = 0) -> tuple[float, float] | None:
        """Its 95 % bootstrap interval, resampling windows."""

    def worse(self, dense: Quality, candidate: Quality) -> float | None:
        """By how much a model is worse than the dense one, as a share; None when one of them is broken."""

    def paired(self, dense: Quality, candidate: Quality, seed: int) -> tuple[float, float]:
        """95 % interval of `worse`, both models resampled on the same windows."""

    def limits(self, gates: Gates) -> tuple[float, float]:
        """What `worse` may be over all data, and on the worst slice."""

    def compared(self, what: str, worse: float, limit: float) -> str:
        """How a model did beside a limit; `what` is "worst slice de" or the measure's name."""

    def allowed(self, gates: Gates) -> str:
        """What the gates let pass, for a plan."""

    def shown(self, value: float | None) -> str:
        """The number for a person."""

    def moved(self, worse: float) -> str:
        """How the number moved, with its sign."""

    def said(self, worse: float) -> str:
        """How the number stands beside the dense model's, in a sentence."""

    def further(self, quality: Quality) -> list[Further]:
        """Other numbers of a sound model."""


class Perplexity:
    """Exp of the mean loss per token; worse is its relative increase (0.1 is 10 %)."""

    name: Name = "perplexity"

    def value(self, quality: Quality) -> float | None:
        """See `Quality.perplexity`."""
        return quality.perplexity

    def interval(self, quality: Quality, seed: int = 0) -> tuple[float, float] | None:
        """See `Quality.interval`."""
        return quality.interval(seed)

    def worse(self, dense: Quality, candidate: Quality) -> float | None:
        """Relative increase of perplexity."""
        before, after = dense.perplexity, candidate.perplexity
        return None if before is None or after is None else after / before - 1

    def paired(self, dense: Quality, candidate: Quality, seed: int) -> tuple[float, float]:
        """Of the increase."""
        (loss, tokens), (other, _) = dense.sums(), candidate.sums()
        picks = resamples(len(loss), seed)
        ratios = np.exp(np.minimum((other[picks] - loss[picks]).sum(1) / tokens[picks].sum(1), LARGEST_MEAN)) - 1
        low, high = np.quantile(ratios, BOUNDS)
        return float(low), float(high)

    def limits(self, gates: Gates) -> tuple[float, float]:
        """As they stand in the job."""
        return gates.perplexity_increase, gates.worst_slice_increase

    def compared(self, what: str, worse: float, limit: float) -> str:
        """Such as "perplexity rose 14.2 % (limit +10 %)"; a rise that no percentage makes clear is told in times."""
        if worse > TOLD_IN_PERCENT:
            moved = f"rose to {worse + 1:.3g} times the dense model's"
        else:
            moved = f"rose {worse:.1%}" if worse >= 0 else f"fell {-worse:.1%}"
        return f"{what} {moved} (limit +{limit:.0%})".replace("%", " %")

    def allowed(self, gates: Gates) -> str:
        """Such as "perplexity at most +10%, worst slice at most +20%"."""
        overall, worst = self.limits(gates)
        return f"perplexity at most +{overall:.0%}, worst slice at most +{worst:.0%}"

    def shown(self, value: float | None) -> str:
        """Such as "18.48"."""
        return "broken" if value is None else f"{value:.2f}"

    def moved(self, worse: float) -> str:
        """Such as "+1.6%"."""
        return f"{worse:+.1%}"

    def said(self, worse: float) -> str:
        """Such as "perplexity 1.6% higher than the dense model's"."""
        return f"perplexity {abs(worse):.1%} {'higher' if worse > 0 else 'lower'} than the dense model's"

    def further(self, quality: Quality) -> list[Further]:
        """Token accuracy."""
        return [Further("token_accuracy", "token accuracy", quality.token_accuracy, "{:.1%}")]


class Accuracy:
    """Share of texts whose class was found; worse is what of it is lost, in the same unit (0.01 is one point)."""

    name: Name = "accuracy"

    def value(self, quality: Quality) -> float | None:
        """Accuracy."""
        return quality.token_accuracy if quality.finite else None

    def interval(self, quality: Quality, seed: int = 0) -> tuple[float, float] | None:
        """Of the accuracy."""
        return resampled(right(quality), seed) if quality.finite else None

    def worse(self, dense: Quality, candidate: Quality) -> float | None:
        """Accuracy that was lost; below zero when some was won."""
        if not dense.finite or not candidate.finite:
            return None
        return float(right(dense).sum() - right(candidate).sum()) / len(dense.windows)  # one in a hundred is 0.01

    def paired(self, dense: Quality, candidate: Quality, seed: int) -> tuple[float, float]:
        """Of the loss."""
        return resampled(right(dense) - right(candidate), seed)

    def limits(self, gates: Gates) -> tuple[float, float]:
        """As they stand in the job, or the defaults."""
        overall = ACCURACY_DROP if gates.accuracy_drop is None else gates.accuracy_drop
        return overall, WORST_SLICE_DROP if gates.worst_slice_drop is None else gates.worst_slice_drop

    def compared(self, what: str, worse: float, limit: float) -> str:
        """Such as "accuracy fell 1.4 points (limit -1)"."""
        moved = f"rose {-100 * worse:.1f}" if worse < 0 else f"fell {100 * worse:.1f}"
        return f"{what} {moved} points (limit -{100 * limit:.3g})"

    def allowed(self, gates: Gates) -> str:
        """Such as "accuracy at most 1 points lower, worst slice at most 2"."""
        overall, worst = self.limits(gates)
        return f"accuracy at most {100 * overall:.3g} points lower, worst slice at most {100 * worst:.3g}"

    def shown(self, value: float | None) -> str:
        """Such as "91.2 %"."""
        return "broken" if value is None else f"{100 * value:.1f} %"

    def moved(self, worse: float) -> str:
        """Such as "-0.8 points"."""
        return f"{-100 * worse:+.1f} points"

    def said(self, worse: float) -> str:
        """Such as "accuracy 0.8 points lower than the dense model's"."""
        return f"accuracy {abs(100 * worse):.1f} points {'lower' if worse > 0 else 'higher'} than the dense model's"

    def further(self, quality: Quality) -> list[Further]:
        """Macro-F1 and the mean loss."""
        loss, texts = quality.sums()
        return [
            Further("macro_f1", "macro-F1", macro_f1(quality), "{:.1%}"),
            Further("mean_loss", "mean loss, nats", float(loss.sum() / texts.sum()), "{:.4f}"),
        ]


PERPLEXITY, ACCURACY = Perplexity(), Accuracy()
MEASURES: dict[str, Measure] = {"perplexity": PERPLEXITY, "accuracy": ACCURACY}


def measure_of(quality: Quality) -> Measure:
    """What a model with these scores is judged by."""
    return ACCURACY if quality.classifies else PERPLEXITY


def macro_f1(quality: Quality) -> float:
    """Mean of the classes' F1, each 2·right / (texts of it + choices of it); of classes that occur at all."""
    labels = np.array([one.label for one in quality.windows])
    chosen = np.array([one.chosen for one in quality.windows])
    found = []
    for number in np.union1d(labels, chosen):
        meant, said = labels == number, chosen == number
        found.append(2 * (meant & said).sum() / (meant.sum() + said.sum()))
    return float(np.mean(found))


def right(quality: Quality) -> np.ndarray:
    """1 for each text whose class was found, else 0; fp64."""
    return np.array([one.right for one in quality.windows], dtype=np.float64)


def resampled(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    low, high = np.quantile(values[resamples(len(values), seed)].mean(1), BOUNDS)
    return float(low), float(high)
