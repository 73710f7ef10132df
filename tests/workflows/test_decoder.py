"""Blocks run alone give what the whole model gives, for every decoder family, with no code per family."""

import json

import pytest
import torch
from models_for_tests import FAMILIES, write_tiny_model
from transformers import AutoModelForCausalLM

from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder
from workflows.models.state import ModelState
from workflows.models.whole import load_model

LENGTH = 48  # longer than the tiny models' sliding window


def state_of(directory) -> ModelState:
    config = json.loads((directory / "config.json").read_text())
    return ModelState(source=str(directory), source_digest="0" * 64, config=config, store=str(directory))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_blocks_alone_equal_the_whole_model(tmp_path, family):
    directory = write_tiny_model(tmp_path / "model", family, layers=4)
    state = state_of(directory)
    attention = "eager" if family == "gemma2" else "sdpa"
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention)
    tokens = torch.randint(4, state.config["vocab_size"], (3, LENGTH), generator=torch.Generator().manual_seed(1))
    wanted = whole.model(tokens, use_cache=False).last_hidden_state

    decoder = Decoder(Checkpoint(state), torch.float32, LENGTH)
    windows = decoder.embed(tokens)
    for index in range(state.block_count):
        block = decoder.block(index)
        windows = [decoder.run(index, block, hidden) for hidden in windows]
    assert torch.allclose(whole.model.norm(torch.cat(windows)), wanted, atol=1e-5)

    loaded = load_model(state, torch.float32)
    assert torch.equal(loaded(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_linears_that_read_the_same_input_are_found(tmp_path, family):
    state = state_of(write_tiny_model(tmp_path / "model", family, layers=2))
    groups = {one.name: one.group for one in Decoder(Checkpoint(state), torch.float32, LENGTH).linears(0)}
    assert groups == {
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.gate_proj",
        "mlp.down_proj": "mlp.down_proj",
    }


def test_only_the_rows_at_hand_are_read(tmp_path):
    state = state_of(write_tiny_model(tmp_path / "model", "llama", layers=1))
    checkpoint = Checkpoint(state)
    whole = checkpoint.read("model.embed_tokens.weight")
    rows = torch.tensor([0, 3, 7, state.config["vocab_size"] - 1])
    assert torch.equal(checkpoint.read_rows("model.embed_tokens.weight", rows), whole[rows])
    chunk = checkpoint.read_linear_rows(0, "mlp.down_proj", 5, 9)
    assert torch.equal(chunk, checkpoint.read("model.layers.0.mlp.down_proj.weight")[5:9])
