"""What is timed is what a user serves."""

import json
import os
from collections import Counter

import pytest
import torch
from models_for_tests import write_tiny_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from cluster.freed import ALLOCATOR
from workflows.measuring import fresh_process, load
from workflows.models.state import ModelState


def operations(model) -> Counter:
    tokens = torch.full((4, 16), 10)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(tokens, use_cache=True, logits_to_keep=1)
    return Counter({one.key: one.count for one in profiled.key_averages() if one.key.startswith("aten::")})


@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_the_timed_model_does_what_a_stock_one_does(tmp_path, family):
    directory = write_tiny_model(tmp_path / "model", family)
    config = json.loads((directory / "config.json").read_text())
    state = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=str(tmp_path / "store"))
    assert operations(load(state, "cpu")) == operations(AutoModelForCausalLM.from_pretrained(directory))


def test_a_fresh_process_has_the_allocators_own_settings(monkeypatch):
    for name, value in ALLOCATOR.items():
        monkeypatch.setenv(name, value)
    unknown = " ".join(f"${name}" for name in ALLOCATOR)
    assert fresh_process(os.path.expandvars, unknown) == unknown
