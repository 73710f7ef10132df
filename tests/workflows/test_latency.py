"""Memory is the model's own, and no speed-up depends on the order of calls."""

import torch
from models_for_tests import write_tiny_model
from transformers import AutoModelForCausalLM

from workflows.evaluation.latency import Shape, measure_footprint, measure_latency

MIB = 1 << 20
SHAPE = Shape(batch=1, prompt=8, new_tokens=1)


def test_memory_counts_the_model_and_not_what_was_there_before(tmp_path):
    directory = write_tiny_model(tmp_path / "m", "llama", layers=1)

    def load(ballast: int) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(directory)
        model.ballast = torch.ones(ballast // 4)
        return model

    earlier = torch.ones(512 * MIB // 4)  # raises the high water, then goes
    del earlier
    measure_footprint(lambda: load(4), SHAPE)  # imports of the first call
    small, large = (measure_footprint(lambda size=size: load(size), SHAPE).peak_bytes for size in (4, 128 * MIB))
    assert small < 64 * MIB
    assert 120 * MIB < large < 256 * MIB


def test_both_models_run_equally_often_and_the_seed_gives_the_order(tmp_path):
    directory = write_tiny_model(tmp_path / "m", "llama", layers=1)
    calls: list[str] = []

    def noted(name: str) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(directory)
        model.register_forward_pre_hook(lambda *_: calls.append(name))
        return model

    models = noted("dense"), noted("compressed")
    orders = []
    for _ in range(2):
        calls.clear()
        measure_latency(*models, (SHAPE,), rounds=8, seed=3)
        orders.append(list(calls))
    assert orders[0] == orders[1]
    turns = orders[0][::2]  # prefill and one decode step each
    assert turns.count("dense") == turns.count("compressed") == 9
    assert {tuple(turns[i : i + 2]) for i in range(0, 18, 2)} == {("dense", "compressed"), ("compressed", "dense")}
