"""A classifier's quality and its gates: accuracy, macro-F1, mean loss, in points and never as perplexity."""

import json
import math

import numpy as np
import pytest
import torch
from classifiers_for_tests import sentences, word_tokenizer, write_sentences, write_tiny_classifier
from torch.nn import functional

from cluster.errors import InputError
from workflows.data.windows import Windows
from workflows.evaluation.gates import Verdict, judge
from workflows.evaluation.live import judge_live
from workflows.evaluation.measures import ACCURACY, PERPLEXITY, macro_f1, measure_of
from workflows.evaluation.quality import Quality, WindowScore, measure_quality, merge
from workflows.models.source import resolve_source
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.recipe import DataSource, Gates, Recipe


def score(label: int, chosen: int, name: str = "all", loss: float | None = 0.5) -> WindowScore:
    return WindowScore(slice=name, tokens=1, loss=loss, right=int(label == chosen), label=label, chosen=chosen)


def quality(right: int, of: int, name: str = "all") -> Quality:
    return Quality(windows=tuple(score(1, int(number < right), name) for number in range(of)))


def test_every_sentence_is_scored_alone(tmp_path):
    directory = write_tiny_classifier(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    model = load_model(
        ModelState(source=str(directory), source_digest="0" * 64, config=config, store=str(tmp_path)), torch.float32
    )
    rows = sentences(6, 0)
    tokens = [np.array(one, dtype=np.int32) for one in word_tokenizer()([text for text, *_ in rows])["input_ids"]]
    windows = Windows(tokens=tokens, slices=[kind for *_, kind in rows], labels=[label for _, label, _ in rows])
    found = measure_quality(model, windows)
    for one, row, (_, label, kind) in zip(found.windows, tokens, rows, strict=True):
        logits = model(torch.from_numpy(row.astype(np.int64))[None]).logits
        assert one.loss == functional.cross_entropy(logits, torch.tensor([label])).item()
        assert (one.label, one.chosen, one.slice, one.tokens) == (label, int(logits.argmax()), kind, 1)
        assert one.right == int(one.chosen == label)
    parts = [measure_quality(model, windows.part(low, high)) for low, high in ((0, 2), (2, 6))]
    assert merge(parts) == found
    assert Quality.model_validate_json(found.model_dump_json()) == found
    assert measure_of(found) is ACCURACY


def test_scores_of_language_models_are_kept_as_before():
    one = WindowScore(slice="a", tokens=3, loss=1.0, right=2)
    assert one.model_dump() == {"slice": "a", "tokens": 3, "loss": 1.0, "right": 2}
    assert measure_of(Quality(windows=(one,))) is PERPLEXITY


def test_macro_f1_counts_classes_alike():
    pairs = [(0, 0), (0, 0), (0, 1), (1, 1), (2, 1)]
    found = macro_f1(Quality(windows=tuple(score(label, chosen) for label, chosen in pairs)))
    assert found == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)
    assert macro_f1(quality(4, 4)) == 1.0


def test_a_drop_at_the_limit_passes_and_one_more_does_not():
    dense = quality(90, 100)
    gates = Gates(accuracy_drop=0.01, worst_slice_drop=0.01)
    passed = judge(dense, quality(89, 100), gates)
    assert passed.passed
    assert passed.increase == 0.01
    assert passed.measure == "accuracy"
    assert passed.sentence == "accuracy fell 1.0 points (limit -1)"
    failed = judge(dense, quality(88, 100), gates)
    assert not failed.passed
    assert judge(dense, quality(95, 100), gates).sentence == "accuracy rose 5.0 points (limit -1)"
    assert judge(dense, quality(89, 100), Gates()).passed
    assert not judge(dense, quality(88, 100), Gates()).passed


def test_the_worst_slice_stops_a_stage():
    dense = Quality(windows=quality(90, 100, "a").windows + quality(90, 100, "b").windows)
    after = Quality(windows=quality(92, 100, "a").windows + quality(86, 100, "b").windows)
    verdict = judge(dense, after, Gates(accuracy_drop=0.02, worst_slice_drop=0.03))
    assert not verdict.passed
    assert (verdict.worst_slice, verdict.worst_increase) == ("b", 0.04)
    assert verdict.sentence == "accuracy fell 1.0 points (limit -2); worst slice b fell 4.0 points (limit -3)"


def test_the_interval_is_paired():
    dense, after = quality(50, 100), quality(50, 100)
    verdict = judge(dense, after, Gates())
    assert verdict.interval == (0.0, 0.0)
    low, high = judge(dense, quality(40, 100), Gates(accuracy_drop=1)).interval
    assert 0.03 < low < 0.1 < high < 0.17
    alone = ACCURACY.interval(dense)
    assert alone[0] < 0.45 < 0.55 < alone[1]


def test_a_broken_classifier_fails_without_nan():
    dense = quality(2, 2)
    after = Quality(windows=(score(1, 1), score(1, 0, loss=None)))
    verdict = judge(dense, after, Gates(accuracy_drop=1, worst_slice_drop=1))
    assert not verdict.passed
    assert "not finite" in verdict.sentence
    assert (verdict.measure, verdict.increase) == ("accuracy", None)
    assert "NaN" not in verdict.model_dump_json()
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict
    assert ACCURACY.shown(ACCURACY.value(after)) == "broken"


def test_a_live_classifier_is_judged_on_fresh_labels(tmp_path):
    source = resolve_source(str(write_tiny_classifier(tmp_path / "model")), tmp_path / "cache")
    table = write_sentences(tmp_path / "fresh.tsv", 20)
    fresh = DataSource(source=str(table), text="sentence", label="label", slice="kind", length=16)
    part = fresh.model_dump()
    data = {
        "calibration": part | {"part": [0, 0.3], "windows": 4},
        "tuning": part | {"part": [0.3, 0.6]},
        "evaluation": part | {"part": [0.6, 1]},
    }
    recipe = Recipe.model_validate({"model": "m", "data": data, "target": {"pattern": "2:4", "sparsity": 0.5}})
    verdict = judge_live(source, source, fresh, recipe)
    assert (verdict.passed, verdict.measure, verdict.increase) == (True, "accuracy", 0.0)
    with pytest.raises(InputError, match=r"data\.label: .* with labels; name their column"):
        judge_live(source, source, fresh.model_copy(update={"label": None}), recipe)


def test_verdicts_of_older_reports_are_those_of_perplexity():
    told = {
        "passed": True,
        "increase": 0.1,
        "interval": None,
        "worst_slice": None,
        "worst_increase": None,
        "reasons": [],
    }
    assert Verdict.model_validate(told).measure == "perplexity"
    assert math.isclose(dict((one.metric, one.value) for one in ACCURACY.further(quality(3, 4)))["mean_loss"], 0.5)
