"""Γ of the streamed pass is that of the whole model under ordinary autograd, wherever boundaries are kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from models_for_tests import write_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from cluster.backwards import Walk
from cluster.storage import open_store
from workflows.data.windows import Windows, to_parquet
from workflows.gradient_files import Importance, put_gradients, read_gammas
from workflows.importance import GradientPass
from workflows.models.state import ModelState

LENGTH, WINDOWS, SHARDS = 48, 6, 4  # longer than the tiny models' sliding window; shards of two sizes


def make_pass(tmp_path, family="llama", layers=3, memory=1 << 30, norms=True, **shape) -> GradientPass:
    directory = write_tiny_model(tmp_path / "model", family, layers=layers, dtype="float32", **shape)
    config = json.loads((directory / "config.json").read_text())
    store = open_store(str(tmp_path / "store"))
    tokens = np.random.default_rng(0).integers(4, config["vocab_size"], (WINDOWS, LENGTH)).astype(np.int32)
    stored = store.put("windows", to_parquet({"calibration": Windows(tokens=tokens, slices=["all"] * WINDOWS)}))
    before = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=store.uri)
    return GradientPass(before, stored.key, SHARDS, "float32", "cpu", threads=1, memory=memory, norms=norms)


def walked(work: GradientPass) -> Importance:
    """What the engine does, in one process."""
    work.setup()
    walk = Walk(work, range(work.shard_count))
    totals = [work.total(parts) for step in range(2 * work.block_count + 1) if (parts := walk.step(step))]
    return work.result(totals[0], totals[:0:-1])


def reference(work: GradientPass) -> Importance:
    """The whole model in memory, transformers' own loss, autograd through everything."""
    attention = "eager" if work.before.config["model_type"] == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        work.before.source, dtype=torch.float32, attn_implementation=attention
    ).eval()
    sums = [
        {name: torch.zeros(one.out_features) for name, one in layer.named_modules() if isinstance(one, nn.Linear)}
        for layer in model.model.layers
    ]

    def observe(total, output):
        def add(own):  # gives nothing back: what a hook returns replaces the gradient
            total.add_(own.square().sum((0, 1)))

        output.register_hook(add)

    for layer, own in zip(model.model.layers, sums, strict=True):
        for name, total in own.items():
            layer.get_submodule(name).register_forward_hook(lambda _, args, out, total=total: observe(total, out))
    loss, norms, outputs = 0.0, [[] for _ in sums], []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    for tokens in work._tokens.split(1):
        outputs.clear()
        mean = model(tokens, labels=tokens, use_cache=False).loss
        for output in outputs:
            output.retain_grad()
        (mean * (LENGTH - 1)).backward()
        loss += mean.item() * (LENGTH - 1)
        for own, output in zip(norms, outputs, strict=True):
            own.append(output.grad.norm(dim=-1))
    count = work._tokens.numel()
    gammas = tuple({name: one / count for name, one in own.items()} for own in sums)
    return Importance(loss, count, gammas, tuple(torch.cat(own).flatten() for own in norms))


def assert_same_bits(one: Importance, two: Importance) -> None:
    assert one.loss == two.loss
    assert len(one.gammas) == len(two.gammas)
    for a, b in zip(one.gammas, two.gammas, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name
    assert len(one.norms) == len(two.norms)
    for own, other in zip(one.norms, two.norms, strict=True):
        assert torch.equal(own, other)


# Untied and tied embeddings, full and sliding attention, and (gemma2) capped logits.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3"])
def test_the_streamed_pass_equals_autograd_through_the_whole_model(tmp_path, monkeypatch, family):
    monkeypatch.setattr("workflows.models.decoder.HEAD_PIECE", 64 * 100)  # so that the tiny head has several pieces
    monkeypatch.setattr("workflows.scoring.gradients.LOGITS_AT_ONCE", 259 * 20)  # and a window several parts
    work = make_pass(tmp_path, family)
    assert work.before.config["tie_word_embeddings"] == family.startswith("gemma")
    found, wanted = walked(work), reference(work)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert found.tokens == WINDOWS * LENGTH
    for block in range(3):
        assert found.gammas[block].keys() == wanted.gammas[block].keys()
        for name, gamma in wanted.gammas[block].items():
            assert gamma.min() > 0
            torch.testing.assert_close(found.gammas[block][name], gamma, rtol=2e-4, atol=1e-6 * gamma.max().item())
        norms = wanted.norms[block]
        assert norms.shape == (WINDOWS * LENGTH,)
        torch.testing.assert_close(found.norms[block], norms, rtol=2e-4, atol=1e-6 * norms.max().item())
    assert not found.norms[-1].view(WINDOWS, LENGTH)[:, -1].any(), "what comes last predicts nothing"


def test_norms_are_extra_and_change_nothing_else(tmp_path):
    work = make_pass(tmp_path)
    plain = walked(replace(work, norms=False))
    assert plain.norms == ()
    assert_same_bits(replace(walked(work), norms=()), plain)


def test_tied_embeddings_are_told_by_the_config(tmp_path):
    """A checkpoint that says so has one matrix for both ends, and transformers takes it for both."""
    work = make_pass(tmp_path, "gemma3")
    assert not any("lm_head" in name for name in work._decoder.checkpoint.shapes())
    assert sum(map(len, work._decoder.vocabulary())) == work.before.config["vocab_size"]


def test_where_boundaries_are_kept_changes_no_bit(tmp_path):
    work = make_pass(tmp_path)
    in_memory = walked(work)
    size = LENGTH * 64 * 4  # one window
    for memory in (0, 3 * size, 10 * size):
        assert_same_bits(walked(replace(work, memory=memory)), in_memory)


def test_bfloat16_is_close(tmp_path):
    work = make_pass(tmp_path)
    rough, fine = walked(replace(work, dtype="bfloat16")), walked(work)
    assert rough.loss == pytest.approx(fine.loss, rel=0.01)
    for a, b in zip(rough.gammas, fine.gammas, strict=True):
        for name in a:
            assert a[name].dtype == torch.float32
            assert a[name].sum().item() == pytest.approx(b[name].sum().item(), rel=0.1), name


def test_a_walk_that_is_asked_for_an_earlier_or_a_later_step_gives_the_same(tmp_path):
    work = make_pass(tmp_path)
    work.setup()
    in_order = Walk(work, [1, 2])
    wanted = [in_order.step(step) for step in range(7)]
    jumping = Walk(work, [1, 2])
    for step in (5, 3, 6):
        for a, b in zip(jumping.step(step), wanted[step], strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in b)


def test_gammas_of_one_block_are_read_alone(tmp_path):
    work = make_pass(tmp_path)
    importance = walked(work)
    store = open_store(str(tmp_path / "store"))
    stored = put_gradients(store, "gammas.safetensors", importance)
    for block in range(3):
        read = read_gammas(store.uri, stored.key, block)
        assert read.keys() == importance.gammas[block].keys()
        assert all(torch.equal(read[name], gamma) for name, gamma in importance.gammas[block].items())
