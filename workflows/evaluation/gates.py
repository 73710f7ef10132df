"""Whether a stage is good enough: by how much it is worse than the dense model, on all data and the worst slice."""

from pydantic import BaseModel, ConfigDict

from workflows.evaluation.measures import Name, measure_of
from workflows.evaluation.quality import Quality
from workflows.recipe import Gates


class Verdict(BaseModel):
    """A gate's decision and its numbers.

    Attributes:
        passed: the decision.
        increase: by how much the model is worse than the dense one, as a share (0.1 is 10 %): the relative increase
            of its perplexity, or, for a classifier, the accuracy that it lost; None when it is broken.
        interval: of `increase`, 95 %.
        worst_slice, worst_increase: the slice on which it is most, and how much there.
        reasons: the decision in words.
        measure: what it was judged by.
    """

    model_config = ConfigDict(frozen=True)

    passed: bool
    increase: float | None
    interval: tuple[float, float] | None
    worst_slice: str | None
    worst_increase: float | None
    reasons: tuple[str, ...]
    measure: Name = "perplexity"

    @property
    def sentence(self) -> str:
        """The decision as one sentence."""
        return "; ".join(self.reasons)


def judge(dense: Quality, candidate: Quality, gates: Gates, seed: int = 0) -> Verdict:
    """Holds a model against its gates.

    The decision is taken on what was measured; its interval is a paired bootstrap over windows, since both models
    saw the same ones. A slice on which the model is broken fails, however good the rest is.
    """
    assert [(one.slice, one.tokens, one.label) for one in dense.windows] == [
        (one.slice, one.tokens, one.label) for one in candidate.windows
    ], "both models are judged on the same windows"
    measure = measure_of(dense)
    limit, slice_limit = measure.limits(gates)
    overall = measure.worse(dense, candidate)
    if overall is None:
        return broken("the model's losses are not finite: it is broken", measure.name)
    by_slice = {}
    for name in dense.slices:
        worse = measure.worse(dense.of_slice(name), candidate.of_slice(name))
        if worse is None:
            return broken(f"the losses on slice {name} are not finite: the model is broken there", measure.name, name)
        by_slice[name] = worse
    worst = max(by_slice, key=lambda name: by_slice[name])
    reasons = [measure.compared(measure.name, overall, limit)]
    if len(by_slice) > 1:
        reasons.append(measure.compared(f"worst slice {worst}", by_slice[worst], slice_limit))
    return Verdict(
        passed=overall <= limit and by_slice[worst] <= slice_limit,
        increase=overall,
        interval=measure.paired(dense, candidate, seed),
        worst_slice=worst,
        worst_increase=by_slice[worst],
        reasons=tuple(reasons),
        measure=measure.name,
    )


def broken(reason: str, measure: Name, worst_slice: str | None = None) -> Verdict:
    """The verdict on a model that cannot be judged."""
    return Verdict(
        passed=False,
        increase=None,
        interval=None,
        worst_slice=worst_slice,
        worst_increase=None,
        reasons=(reason,),
        measure=measure,
    )
