"""Block recovery: Adam on the survivors, toward the dense model's hidden states."""

import math

import pytest
import torch
from test_blockwork import make_stage, streamed
from transformers import AutoModelForCausalLM

from workflows.pruning.patterns import verify
from workflows.pruning.recovery import descend, distance, no_moment
from workflows.recipe import Recovery

RATE = 0.01


def test_a_step_is_adams_on_the_survivors():
    torch.manual_seed(0)
    weight = torch.randn(6, 8) * (torch.rand(6, 8) < 0.5)
    keep, scale = weight != 0, weight[weight != 0].square().mean().sqrt().item()
    expected = torch.nn.Parameter(weight.clone())
    adam = torch.optim.Adam([expected], betas=(0.9, 0.95), eps=0)
    weights = {"w": weight}
    moments = (no_moment(weights), no_moment(weights))
    for step in range(5):
        parts = [torch.randn(6, 8) for _ in range(3)]
        scale = weights["w"][keep].square().mean().sqrt().item()
        adam.param_groups[0]["lr"] = scale * RATE * 0.5 * (1 + math.cos(math.pi * step / 5))
        expected.grad = sum(parts)
        adam.step()
        weights, moments = descend(weights, moments, [{"w": part} for part in parts], step, 5, RATE)
        torch.testing.assert_close(weights["w"][keep], expected[keep])
        assert (weights["w"][~keep] == 0).all()


def test_long_tokens_count_like_short_ones():
    wanted = torch.tensor([[1.0, 0.0], [1000.0, 0.0]])
    assert distance(wanted * 1.1, wanted).item() == pytest.approx(2 * 0.01, rel=1e-4)


@torch.no_grad()
def total_distance(stage, blocks) -> list[float]:
    """After each block: how far the pruned model's hidden states are from the dense model's."""
    load = AutoModelForCausalLM.from_pretrained
    dense, pruned = (load(stage.before.source, dtype=torch.float32, attn_implementation="sdpa") for _ in range(2))
    for block in blocks:
        pruned.load_state_dict(block, strict=False)
    states = (model(stage._tokens, output_hidden_states=True).hidden_states for model in (pruned, dense))
    return [distance(a, b).item() for a, b in zip(*states, strict=True)][1:-1]  # the last one is behind a norm


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_hidden_states_come_nearer_to_the_dense_models(tmp_path, pattern):
    plain = make_stage(tmp_path / "plain", pattern, 0.5)
    better = make_stage(tmp_path / "better", pattern, 0.5, recovery=Recovery(steps=12))
    blocks = streamed(better)
    before, after = total_distance(plain, streamed(plain)), total_distance(better, blocks)
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True)), (before, after)
    for block in blocks:
        for name, tensor in block.items():
            if name.endswith("proj.weight"):
                verify(tensor, pattern, 0.5)


@pytest.mark.parametrize("pattern", ["2:4", "ffn"])
def test_gradients_are_those_of_the_whole_model(tmp_path, pattern):
    stage = make_stage(tmp_path, pattern, 0.5, recovery=Recovery(steps=1))
    stage.setup()
    units = stage.units()
    groups = sorted({unit.group for unit in units})
    shards = {0: stage.open_shard(0)}
    sums = list(stage.statistics(0, shards, groups))
    prepared = {name: stage.prepare(name, total) for name, total in zip(groups, sums, strict=True)}
    results = [stage.solve(0, unit, prepared[unit.group]) for unit in units]
    seen, _ = stage.begin(0, results)
    (found,) = stage.look(0, 0, seen, shards)

    model = AutoModelForCausalLM.from_pretrained(stage.before.source, dtype=torch.float32, attn_implementation="sdpa")
    window = stage._tokens[:1]
    with torch.no_grad():
        wanted = model(window, output_hidden_states=True).hidden_states[1]
    layer = model.model.layers[0]
    for name, value in seen.items():
        layer.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(torch.from_numpy(value.copy()))
    outputs = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(window)
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    distance(output, wanted).backward()
    for name, gradient in found.items():
        expected = layer.get_parameter(name).grad
        torch.testing.assert_close(torch.from_numpy(gradient), expected, rtol=1e-4, atol=1e-6)
