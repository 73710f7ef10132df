"""Gates at their edges: a broken slice, other windows, huge rises."""

import pytest

from workflows.evaluation.gates import Verdict, judge
from workflows.evaluation.quality import Quality, WindowScore
from workflows.recipe import Gates


def quality(**losses: list[float | None]) -> Quality:
    scores = [WindowScore(slice=name, tokens=10, loss=one, right=5) for name, all_ in losses.items() for one in all_]
    return Quality(windows=tuple(scores))


def test_one_broken_slice_fails_however_small_it_is():
    dense, candidate = quality(many=[10.0] * 999, few=[10.0]), quality(many=[10.0] * 999, few=[8000.0])
    verdict = judge(dense, candidate, Gates(perplexity_increase=2, worst_slice_increase=2))
    assert not verdict.passed
    assert (verdict.worst_slice, verdict.worst_increase) == ("few", None)
    assert "slice few" in verdict.sentence


def test_models_that_saw_other_windows_are_not_compared():
    with pytest.raises(AssertionError, match="same windows"):
        judge(quality(a=[10.0], b=[10.0]), quality(a=[10.0], c=[10.0]), Gates())
    with pytest.raises(AssertionError, match="same windows"):
        judge(quality(a=[10.0] * 4), quality(a=[10.0] * 2), Gates())


def test_a_huge_rise_is_told_in_times_and_survives_json():
    verdict = judge(quality(a=[10.0, 10.0]), quality(a=[10.0, 13000.0]), Gates())
    assert "times the dense model's (limit +10 %)" in verdict.sentence
    assert len(verdict.sentence) < 200
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_the_interval_is_paired():
    spread = [5.0, 10.0, 40.0, 80.0]
    verdict = judge(quality(a=spread), quality(a=[one + 1 for one in spread]), Gates())
    assert verdict.interval == pytest.approx((verdict.increase, verdict.increase))  # the same rise on every window
