"""Passes through blocks that halt: the block's own numbers, and linears that are replaced on the way."""

import json
from functools import partial

import pytest
import torch
from models_for_tests import write_tiny_model

from cluster.storage import open_store
from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder
from workflows.models.passes import Pass, halting, replace
from workflows.models.state import ModelState

LENGTH = 16
READERS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def decoder_of(tmp_path, family) -> Decoder:
    directory = write_tiny_model(tmp_path / "model", family, layers=1, hidden=64, ffn=128, dtype="float32")
    config = json.loads((directory / "config.json").read_text())
    store = open_store(str(tmp_path / "store"))
    state = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=store.uri)
    return Decoder(Checkpoint(state), torch.float32, LENGTH)


def windows(count: int = 1) -> list[torch.Tensor]:
    return list(torch.randn(count, 1, LENGTH, 64, generator=torch.Generator().manual_seed(0)))


def passes(decoder: Decoder, names, own) -> tuple[torch.nn.Module, list[Pass]]:
    block = halting(decoder.block(0), names)
    return block, [Pass(partial(decoder.run, 0, block, hidden)) for hidden in own]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_a_pass_halts_at_every_reader_and_gives_what_the_block_gives(tmp_path, family):
    decoder = decoder_of(tmp_path, family)
    (window,) = windows()
    _, (own,) = passes(decoder, READERS, [window])
    assert [reading.linear for reading in own] == READERS
    assert torch.equal(own.finish(), decoder.run(0, decoder.block(0), window))


def test_what_is_replaced_while_windows_wait_counts_behind_them(tmp_path):
    """And windows that wait beside each other do not meet."""
    decoder, waiting = decoder_of(tmp_path, "llama"), windows(3)
    block, all_of_them = passes(decoder, READERS, waiting)
    changed = decoder.block(0)
    for name in READERS:
        inputs = []
        for one in all_of_them:
            reading = next(one)
            assert reading.linear == name
            inputs.append(reading.inputs)
        assert not torch.equal(inputs[0], inputs[1])
        weight = {f"{name}.weight": block.get_parameter(f"{name}.weight") * 0.5}
        replace(block, weight)
        replace(changed, weight)
    for one, window in zip(all_of_them, waiting, strict=True):
        assert torch.equal(one.finish(), decoder.run(0, changed, window))
        assert not torch.equal(one.finish(), decoder.run(0, decoder.block(0), window))


def test_all_experts_inputs_are_there_before_one_is_used(tmp_path):
    decoder, (window,) = decoder_of(tmp_path, "qwen3_moe"), windows()
    linears = decoder.linears(0)
    gates, downs = ([one.name for one in linears if one.name.endswith(end)] for end in ("gate_proj", "down_proj"))
    block, (own,) = passes(decoder, [*gates, *downs], [window])
    changed = decoder.block(0)
    for names in (gates, downs):
        seen = [next(own) for _ in names]
        assert [reading.linear for reading in seen] == names
        assert all(len(reading.inputs) == len(reading.tokens) for reading in seen)
        weights = {f"{name}.weight": block.get_parameter(f"{name}.weight") * 0.5 for name in names}
        replace(block, weights)
        replace(changed, weights)
    assert torch.equal(own.finish(), decoder.run(0, changed, window))


def test_an_error_of_the_block_reaches_whoever_goes_on(tmp_path):
    decoder = decoder_of(tmp_path, "llama")
    block, (own,) = passes(decoder, READERS, windows())
    next(own)
    block.get_submodule("self_attn.o_proj").weight.data = torch.zeros(3, 3)
    next(own)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        own.finish()


def test_a_block_that_halts_is_not_run_alone(tmp_path):
    decoder = decoder_of(tmp_path, "llama")
    block, _ = passes(decoder, READERS, [])
    with pytest.raises(AssertionError, match="without a Pass"):
        decoder.run(0, block, windows()[0])
