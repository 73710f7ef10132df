"""Quality where numbers end: broken windows, overflow, empty slices; nothing that JSON cannot hold."""

import warnings

import pytest

from cluster.errors import InputError
from workflows.compress import check_sound
from workflows.evaluation.quality import Quality, WindowScore


def quality(*losses: float | None) -> Quality:
    return Quality(windows=tuple(WindowScore(slice="a", tokens=10, loss=one, right=5) for one in losses))


@pytest.mark.parametrize("losses", [(10.0, None), (8000.0, 8000.0), ()])
def test_no_perplexity_is_none_and_silent(losses):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quality(*losses)
        assert found.perplexity is None
        assert found.interval() is None
        assert not found.finite


def test_an_interval_stays_a_number_where_resamples_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = quality(10.0, 13000.0).interval()
    assert low < high < float("inf")


def test_scores_survive_json():
    found = quality(10.0, None, 8000.0)
    assert Quality.model_validate_json(found.model_dump_json()) == found


def test_the_interval_is_a_function_of_the_seed():
    found = quality(10.0, 11.0, 14.0, 12.0)
    assert found.interval(1) == found.interval(1) != found.interval(2)


def test_a_dense_model_without_a_perplexity_is_bad_input():
    check_sound("some/dir", quality(1.0, 2.0))
    with pytest.raises(InputError, match=r"model: some/dir: its losses on data\.evaluation are not finite") as refused:
        check_sound("some/dir", quality(1.0, None))
    assert refused.value.exit_code == 2
