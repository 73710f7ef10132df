"""Quality, gates, latency and money: numbers checked against plain formulas."""

import json
import math

import numpy as np
import pytest
import torch
from models_for_tests import write_tiny_model
from torch.nn import functional

from workflows.data.windows import Windows
from workflows.evaluation.cost import Throughput, Traffic, cost, seconds_per_request
from workflows.evaluation.gates import judge
from workflows.evaluation.latency import PairedTiming, Shape, Timing, measure_latency
from workflows.evaluation.quality import Quality, WindowScore, measure_quality, merge
from workflows.measuring import footprint
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.recipe import Gates


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("eval") / "m", "gemma2", layers=2)
    config = json.loads((directory / "config.json").read_text())
    return ModelState(source=str(directory), source_digest="0" * 64, config=config, store=str(directory))


def quality(**losses: list[float | None]) -> Quality:
    scores = [WindowScore(slice=name, tokens=10, loss=one, right=5) for name, all_ in losses.items() for one in all_]
    return Quality(windows=tuple(scores))


@torch.inference_mode()
def test_quality_is_the_plain_formula(state):
    model = load_model(state, torch.float32)
    tokens = np.random.default_rng(0).integers(3, 200, (4, 300)).astype(np.int32)
    windows = Windows(tokens=tokens, slices=["a", "b", "a", "b"])
    found = measure_quality(model, windows)
    logits = model(torch.from_numpy(tokens.astype(np.int64))).logits[:, :-1].float()
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64))
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(4, -1)
    assert found.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert found.of_slice("b").perplexity == pytest.approx(losses[[1, 3]].mean().exp().item(), rel=1e-5)
    assert found.token_accuracy == pytest.approx((logits.argmax(-1) == targets).float().mean().item())
    low, high = found.interval()
    assert low < found.perplexity < high
    halves = [
        measure_quality(model, Windows(tokens=tokens[i:j], slices=windows.slices[i:j])) for i, j in ((0, 1), (1, 4))
    ]
    assert merge(halves) == found


def test_a_gate_looks_at_all_data_and_at_the_worst_slice():
    dense = quality(good=[10.0, 10.0], bad=[10.0, 10.0])
    slightly = quality(good=[10.0, 10.0], bad=[11.0, 11.0])
    gates = Gates(perplexity_increase=0.06, worst_slice_increase=0.2)
    passed = judge(dense, slightly, gates)
    assert passed.passed
    assert passed.increase == pytest.approx(math.exp(0.05) - 1)
    assert (passed.worst_slice, passed.worst_increase) == ("bad", pytest.approx(math.exp(0.1) - 1))
    assert passed.interval[0] <= passed.increase <= passed.interval[1]
    strict = judge(dense, slightly, gates.model_copy(update={"worst_slice_increase": 0.1}))
    assert not strict.passed
    assert "worst slice bad rose 10.5 % (limit +10 %)" in strict.sentence
    assert not judge(dense, slightly, Gates(perplexity_increase=0.05)).passed
    assert judge(slightly, dense, Gates(perplexity_increase=0)).sentence.startswith("perplexity fell 4.9 %")


def test_a_broken_model_fails_its_gate_without_nan():
    verdict = judge(quality(a=[10.0]), quality(a=[None]), Gates(perplexity_increase=100))
    assert not verdict.passed
    assert "not finite" in verdict.sentence
    assert "NaN" not in verdict.model_dump_json()


def test_latency_takes_turns_and_counts_every_round(state):
    model = load_model(state, torch.float32)
    shapes = (Shape(batch=2, prompt=16, new_tokens=3),)
    prefill, decode = measure_latency(model, model, shapes, rounds=4)
    assert (prefill.phase, decode.phase) == ("prefill", "decode")
    assert len(prefill.dense.seconds) == len(decode.compressed.seconds) == 4
    assert (prefill.dense.tokens, decode.dense.tokens) == (32, 6)
    assert all(one > 0 for one in (*prefill.dense.seconds, *decode.compressed.seconds))


def test_speedup_is_paired_round_by_round():
    drifting = [1.0, 2.0, 4.0, 8.0]
    pair = PairedTiming(
        phase="prefill",
        shape=Shape(batch=1, prompt=1, new_tokens=1),
        dense=Timing(seconds=tuple(2 * one for one in drifting), tokens=1),
        compressed=Timing(seconds=tuple(drifting), tokens=1),
    )
    assert pair.speedup() == (2.0, 2.0, 2.0)


def test_memory_is_measured_above_the_interpreter(state):
    found = footprint(state, Shape(batch=1, prompt=8, new_tokens=1), 1, "cpu")
    assert found.load_seconds > 0
    assert found.peak_bytes >= 0


def test_money():
    dense, compressed = Throughput(prefill=1000, decode=10), Throughput(prefill=2000, decode=20)
    traffic = Traffic(requests_per_day=1000, prompt_tokens=500, output_tokens=100)
    assert seconds_per_request(dense, traffic) == pytest.approx(10.5)
    found = cost(dense, compressed, traffic, 3.6, "somewhere", 1000, 2, "a shape")
    assert found.dense_per_million == pytest.approx(10.5 * 0.001 / 600 * 1e6)
    assert found.compressed_per_month == pytest.approx(found.dense_per_month / 2)
    assert found.run == pytest.approx(2.0)
    assert found.months_to_pay_back == pytest.approx(2.0 / (found.dense_per_month / 2))
    assert cost(dense, dense, traffic, 3.6, "x", 1, 1, "y").months_to_pay_back is None
    assert len(found.assumptions) == 5
