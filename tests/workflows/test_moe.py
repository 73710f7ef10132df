"""Mixtures of experts: run, observed, pruned and written expert by expert, held against transformers' fused modules."""

import json
from collections import defaultdict

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import MIXTURES, write_tiny_model
from test_blockwork import LENGTH, make_stage, streamed
from transformers import AutoModelForCausalLM

from cluster.alone import totals
from cluster.errors import InputError
from cluster.storage import open_store
from workflows import stages
from workflows.blockwork import PruneStage
from workflows.formats.huggingface import format_release
from workflows.gradient_files import Importance, put_gradients
from workflows.importance import GradientPass
from workflows.measuring import load
from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder
from workflows.models.expert_names import MIXTURES as NAMES
from workflows.models.expert_names import is_router, one_by_one
from workflows.models.safetensors_header import TensorInfo
from workflows.models.source import resolve_source
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.observing import completed
from workflows.pruning import patterns
from workflows.recipe import Recipe, Recovery
from workflows.scoring.gram import add_inputs, mirror
from workflows.scoring.shrinkage import PRIOR, shrink
from workflows.scoring.token_weights import token_weights
from workflows.tuning.masks import pruned_positions

EXPERTS, CHOICES, HIDDEN, FFN = 6, 2, 64, 128
UNSEEN = 4


def make(tmp_path, pattern="unstructured", sparsity=0.5, family="qwen3_moe", **more) -> PruneStage:
    return make_stage(tmp_path, pattern, sparsity, family=family, layers=2, **more)


def stock(state: ModelState, **options):
    return AutoModelForCausalLM.from_pretrained(state.source, dtype=torch.float32, **options)


def gathered(stage: PruneStage, block: int = 0) -> dict[str, torch.Tensor]:
    """Statistics of block 0's inputs, all shards added up."""
    groups = sorted({unit.group for unit in stage.units()})
    shards = {shard: stage.open_shard(shard) for shard in range(stage.shard_count)}
    sums = totals(stage.statistics(block, shards, groups), groups, stage.shard_count)
    return {name: completed(total, "cpu") for name, total in sums.items()}


@torch.inference_mode()
def routed(stage: PruneStage) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What enters each expert of block 0 of the stock model, and its down projection: [tokens, in] each."""
    model = stock(stage.before)
    experts, seen = model.model.layers[0].mlp.experts, []
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    for window in stage._tokens:
        model(window[None], use_cache=False)
    inputs = defaultdict(list)
    for hidden, chosen, _ in seen:
        for token, numbers in zip(hidden, chosen.tolist(), strict=True):
            for number in numbers:
                inputs[number].append(token)
    found = {}
    for number in range(EXPERTS):
        own = torch.stack(inputs[number]) if number in inputs else torch.zeros(0, HIDDEN)
        gate, up = (own @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
        found[number] = own, torch.nn.functional.silu(gate) * up
    return found


def blind(stage: PruneStage) -> None:
    """Rewrites the routers so that no token ever chooses the experts from UNSEEN on."""
    file = f"{stage.before.source}/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(".gate.weight"):
            # Of two pairs ±a, ±b two are positive, and a row of zeros gives 0.
            tensor[1], tensor[3], tensor[UNSEEN:] = -tensor[0], -tensor[2], 0
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", MIXTURES)
@torch.inference_mode()
def test_experts_one_by_one_give_what_the_fused_ones_give(tmp_path, family):
    stage = make(tmp_path, family=family)
    tokens, state = stage._tokens, stage.before
    for implementation in ("eager", "grouped_mm"):
        wanted = stock(state, experts_implementation=implementation)(tokens).logits
        assert torch.allclose(load_model(state, torch.float32)(tokens).logits, wanted, atol=1e-5)
    assert torch.equal(load(state, "cpu")(tokens).logits, stock(state)(tokens).logits), "not the stock modules"

    decoder = Decoder(Checkpoint(state), torch.float32, LENGTH)
    hidden = torch.cat(decoder.embed(tokens))
    for block in range(state.block_count):
        hidden = decoder.run(block, decoder.block(block), hidden)
    model = stock(state)
    assert torch.allclose(model.lm_head(model.model.norm(hidden)), model(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_every_experts_matrices_are_listed_and_no_router(tmp_path, family):
    stage = make(tmp_path, family=family)
    linears = {one.name: one for one in Decoder(Checkpoint(stage.before), torch.float32, LENGTH).linears(0)}
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    shared = [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")] if family == "qwen2_moe" else []
    mixture, gate, up, down = NAMES[family]
    experts = [
        f"{mixture}.experts.{number}.{part}"
        for own in ((gate, up), (down,))
        for number in range(EXPERTS)
        for part in own
    ]
    assert list(linears) == [*attention, *shared, *experts]
    for number in range(EXPERTS):
        own = f"{mixture}.experts.{number}."
        assert [linears[own + part].group for part in (gate, up, down)] == [own + gate, own + gate, own + down]
    stored = Checkpoint(stage.before)
    for name, one in linears.items():
        assert stored.read_linear_rows(0, name, 0, one.rows).shape == (one.rows, one.columns)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("solver", ["sparsegpt", "wanda"])
def test_grams_are_those_of_the_routed_tokens_and_lean_on_the_mean(tmp_path, family, solver):
    stage = make(tmp_path, family=family, solver=solver)
    blind(stage)
    found, inputs = gathered(stage), routed(stage)
    assert sum(len(own) for own, _ in inputs.values()) == CHOICES * stage._tokens.numel()
    assert len(inputs[UNSEEN][0]) == 0
    mixture, gate, _, down = NAMES[family]
    for place, part in enumerate((gate, down)):
        grams = {}
        for number, own in inputs.items():
            grams[number] = torch.zeros(own[place].shape[1], own[place].shape[1])
            add_inputs(grams[number], own[place])
            mirror(grams[number])
        mean = sum(grams.values()) / (CHOICES * stage._tokens.numel())
        for number, gram in grams.items():
            wanted = gram + PRIOR * len(mean) * mean
            got = found[f"{mixture}.experts.{number}.{part}"]
            assert torch.allclose(got, wanted if got.ndim == 2 else wanted.diagonal(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("solver", ["sparsegpt", "wanda"])
def test_tokens_keep_their_weights_wherever_they_are_routed(tmp_path, family, solver):
    stage = make(tmp_path, family=family, solver=solver)
    blind(stage)
    norms = torch.rand(stage._tokens.shape, generator=torch.Generator().manual_seed(0)) ** 3
    importance = Importance(1.0, norms.numel(), [{}, {}], [norms, norms.clone()])
    stored = put_gradients(open_store(stage.before.store), "gradients.safetensors", importance)
    found = gathered(PruneStage(**stage.__getstate__() | {"norms": stored}))
    weights, inputs = routed_weights(stage, token_weights(norms)), routed(stage)
    assert sum(own.sum().item() for own in weights.values()) == pytest.approx(CHOICES * norms.numel(), rel=1e-5)
    mixture, gate, _, down = NAMES[family]
    for place, part in enumerate((gate, down)):
        grams = {
            number: torch.einsum("t,ti,tj->ij", weights[number], own[place], own[place])
            for number, own in inputs.items()
        }
        mean = sum(grams.values()) / (CHOICES * norms.numel())
        for number, gram in grams.items():
            wanted = gram + PRIOR * len(mean) * mean
            got = found[f"{mixture}.experts.{number}.{part}"]
            assert torch.allclose(got, wanted if got.ndim == 2 else wanted.diagonal(), atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def routed_weights(stage: PruneStage, weights: torch.Tensor) -> dict[int, torch.Tensor]:
    """Of what `routed` gives, how much each token counts."""
    model, seen = stock(stage.before), []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    for window in stage._tokens:
        model(window[None], use_cache=False)
    found = defaultdict(list)
    for chosen, own in zip(seen, weights, strict=True):
        for numbers, weight in zip(chosen.tolist(), own, strict=True):
            for number in numbers:
                found[number].append(weight)
    return {number: torch.stack(found[number]) if number in found else torch.zeros(0) for number in range(EXPERTS)}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen2_moe", "olmoe"])
@pytest.mark.parametrize(("pattern", "sparsity", "solver"), [("unstructured", 0.6, "sparsegpt"), ("2:4", 0.5, "wanda")])
def test_a_release_is_stock_and_every_matrix_of_every_expert_is_sparse(tmp_path, family, pattern, sparsity, solver):
    stage = make(tmp_path, pattern, sparsity, family=family, solver=solver)
    blind(stage)
    streamed(stage)
    state, model = released(stage, tmp_path / "release")
    before = stock(stage.before)
    for layer, dense in zip(model.model.layers, before.model.layers, strict=True):
        for fused in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            matrices = [
                half for one in fused for half in (one.chunk(2) if fused is layer.mlp.experts.gate_up_proj else [one])
            ]
            assert len(matrices) in (EXPERTS, 2 * EXPERTS)
            for matrix in matrices:
                patterns.verify(matrix, pattern, sparsity)
                assert patterns.achieved(matrix) == pytest.approx(sparsity, abs=2e-3)
        routers = {name: one for name, one in layer.named_parameters() if is_router(name.removesuffix(".weight"))}
        assert len(routers) == (2 if family == "qwen2_moe" else 1)
        for name, router in routers.items():
            assert torch.equal(router, dense.get_parameter(name)), name
    assert torch.isfinite(model(stage._tokens).logits).all()
    assert torch.allclose(
        load_model(state, torch.float32)(stage._tokens).logits, model(stage._tokens).logits, atol=1e-5
    )


def released(stage: PruneStage, directory):
    """The finished blocks as a release, and the stock model that loads from it."""
    store = open_store(stage.before.store)
    keys = [f"{stage.key_prefix}/{block:05d}.safetensors" for block in range(stage.block_count)]
    state = stage.before.model_copy(update={"blocks": tuple(store.put(key, store.get(key)) for key in keys)})
    for form in ("compact", "huggingface"):
        formatted = format_release(state, (), f"release/{form}", form, sparse=True)
        assert formatted.size.zeros / formatted.size.block_parameters == pytest.approx(stage.sparsity, abs=2e-3)
    directory.mkdir()
    for name, stored in formatted.files.items():
        (directory / name).write_bytes(store.get(stored.key))
    model, notes = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(notes.values()), notes
    return state, model.requires_grad_(False)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_fused_checkpoint_gives_the_same_bytes(tmp_path, family):
    stage = make(tmp_path, "2:4", family=family)
    wanted = streamed(stage)
    fused = write_tiny_model(
        tmp_path / "fused", family, layers=2, hidden=HIDDEN, ffn=FFN, dtype="float32", save_original_format=False
    )
    names = safetensors.torch.load_file(fused / "model.safetensors")
    assert names["model.layers.0.mlp.experts.down_proj"].ndim == 3, "transformers wrote it some other way"
    assert resolve_source(str(fused), tmp_path).config["num_hidden_layers"] == 2
    changed = PruneStage(**stage.__getstate__() | {"before": stage.before.model_copy(update={"source": str(fused)})})
    for ours, theirs in zip(streamed(changed), wanted, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_recovery_and_importance_work_on_experts(tmp_path):
    stage = make(tmp_path, "2:4", recovery=Recovery(steps=4))
    blind(stage)
    plain = PruneStage(**stage.__getstate__() | {"recovery": None, "key_prefix": "plain"})
    before, after = streamed(plain)[0], streamed(stage)[0]
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in after)
    assert {"model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.mlp.experts.3.down_proj.weight"} <= set(
        moved
    )
    assert not [name for name in moved if f".experts.{UNSEEN}." in name or is_router(name.removesuffix(".weight"))]

    work = GradientPass(stage.before, stage.windows_key, 1, "float32", "cpu", threads=1, memory=1 << 30)
    held = work.begin([0])
    for block in range(2):
        work.forward(block, held)
    work.turn(held)
    squares = work.backward(1, held)[0]
    model = stock(stage.before)
    gate_up = model.model.layers[1].mlp.experts.gate_up_proj.requires_grad_(True)
    for window in stage._tokens:  # ∂L/∂W is zero in all columns where, and only where, no gradient came through a row
        (model(window[None], labels=window[None], use_cache=False).loss).backward()
    for number in range(EXPERTS):
        rows = gate_up.grad[number].chunk(2)
        for name, gradient in zip(("gate_proj", "up_proj"), rows, strict=True):
            own = squares[f"mlp.experts.{number}.{name}"]
            assert np.array_equal(own > 0, gradient.abs().amax(1).numpy() > 0)
            assert bool(own.any()) == (number < UNSEEN)


def test_tuning_holds_the_zeros_of_experts(tmp_path):
    stage = make(tmp_path, "2:4", family="mixtral", solver="magnitude")
    blocks = streamed(stage)
    store = open_store(stage.before.store)
    keys = [f"{stage.key_prefix}/{block:05d}.safetensors" for block in range(2)]
    state = stage.before.model_copy(update={"blocks": tuple(store.put(key, store.get(key)) for key in keys)})
    layer = load_model(state, torch.float32).model.layers[0]
    positions = pruned_positions(layer)
    assert {name for name, _ in layer.named_parameters()} == {one.removeprefix("model.layers.0.") for one in blocks[0]}
    assert positions.keys() == {f"{one.name}.weight" for one in stage._decoder.linears(0)}


def recipe(pattern: str, sparsity: float) -> Recipe:
    return Recipe.model_validate({"model": "m", "target": {"pattern": pattern, "sparsity": sparsity}})


def test_what_does_not_fit_experts_is_refused(tmp_path):
    state = make(tmp_path).before
    with pytest.raises(InputError, match="ffn takes channels of a block's one MLP, but qwen3_moe has 6 experts"):
        stages.config_after(state.config, recipe("ffn", 0.5), 0.5)
    stages.check_pattern(state, recipe("16:32", 0.5))
    with pytest.raises(InputError, match=r"experts\.0\.down_proj\.weight has 32 columns, no multiple of 64"):
        stages.check_pattern(state, recipe("32:64", 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": [0]}, "only some blocks"),
        ({"decoder_sparse_step": 2}, "only some blocks"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok: 7 of 6 experts"),
        ({"num_local_experts": 0}, "num_local_experts: 0 is no whole number"),
        ({"num_local_experts": 1 << 20}, "more than 65536 in all"),
        ({"num_experts": 5}, "one number of experts"),
        ({"num_local_experts": 5}, "none of the model"),
        ({"moe_intermediate_size": "32"}, "moe_intermediate_size"),
    ],
)
def test_configs_of_odd_mixtures_are_refused(tmp_path, changes, message):
    directory = write_tiny_model(tmp_path / "model", "qwen3_moe")
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        resolve_source(str(directory), tmp_path)


@given(experts=st.integers(1, 5), rows=st.integers(1, 4), columns=st.integers(1, 4), family=st.sampled_from(MIXTURES))
def test_fused_bytes_are_those_of_the_matrices(experts, rows, columns, family):
    gate_up = torch.rand(experts, 2 * rows, columns)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"model_type": family, "num_experts": experts, "num_hidden_layers": 1}
    found = one_by_one({name: TensorInfo("F32", tuple(gate_up.shape), 100, 100 + gate_up.nbytes)}, config)
    data = b"\0" * 100 + gate_up.numpy().tobytes()
    mixture, gate, up, _ = NAMES[family]
    assert len(found) == 2 * experts
    for number in range(experts):
        for part, wanted in zip((gate, up), gate_up[number].chunk(2), strict=True):
            info = found[f"model.layers.0.{mixture}.experts.{number}.{part}.weight"]
            got = np.frombuffer(data[info.start : info.end], np.float32).reshape(info.shape)
            assert np.array_equal(got, wanted.numpy())


def test_a_matrix_that_is_there_twice_is_refused():
    config = {"model_type": "qwen3_moe", "num_experts": 1, "num_hidden_layers": 1}
    fused = TensorInfo("F32", (1, 2, 2), 0, 16)
    alone = TensorInfo("F32", (2, 2), 16, 32)
    names = ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.0.down_proj.weight")
    with pytest.raises(InputError, match="there twice"):
        one_by_one(dict(zip(names, (fused, alone), strict=True)), config)


@given(shards=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 1000))
def test_shrunk_parts_add_up_to_the_shrunk_whole(shards, width, seed):
    random = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 9, (shards, 3), generator=random)
    counts[0, 0] += 1
    parts = torch.zeros(shards, 3, width, width)
    for shard in range(shards):
        for expert in range(3):
            add_inputs(parts[shard, expert], torch.randn(int(counts[shard, expert]), width, generator=random))
            mirror(parts[shard, expert])
    whole, choices = parts.sum(0), int(counts.sum())
    wanted = whole + PRIOR * width * whole.sum(0) / choices
    for part in parts:
        shrink(list(part), choices)
    assert torch.allclose(parts.sum(0), wanted, atol=1e-5, rtol=1e-4)
