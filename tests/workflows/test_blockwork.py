"""The streamed stage against a whole-model reference, without Ray: same numbers, one block at a time."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_for_tests import write_tiny_model
from transformers import AutoModelForCausalLM

from cluster.alone import blocks_alone, totals
from cluster.storage import open_store
from workflows.blockwork import DensePruneStage, PruneStage, chunks
from workflows.data.windows import Windows, to_parquet
from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder
from workflows.models.state import ModelState
from workflows.observing import completed
from workflows.pruning.ffn import remove_channels
from workflows.pruning.patterns import parse
from workflows.pruning.refit import refit
from workflows.pruning.solvers import SOLVERS
from workflows.pruning.swaps import swap
from workflows.recipe import Solver
from workflows.scoring.gram import add_inputs, damped, mirror

LENGTH, WINDOWS, SHARDS, ROWS = 32, 6, 3, 24
LEADERS = ("o_proj", "gate_proj", "down_proj")  # the first to read an input that linears before them change


def make_stage(
    tmp_path, pattern, sparsity, solver="sparsegpt", family="gemma3", layers=3, ffn=128, refit_steps=0, recovery=None
) -> PruneStage:
    directory = write_tiny_model(tmp_path / "model", family, layers=layers, hidden=64, ffn=ffn, dtype="float32")
    config = json.loads((directory / "config.json").read_text())
    store = open_store(str(tmp_path / "store"))
    tokens = np.random.default_rng(0).integers(4, config["vocab_size"], (WINDOWS, LENGTH)).astype(np.int32)
    windows = Windows(tokens=tokens, slices=["all"] * WINDOWS)
    stored = store.put("windows.parquet", to_parquet({"calibration": windows}))
    after = config | ({"intermediate_size": int(ffn * (1 - sparsity))} if pattern == "ffn" else {})
    state = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=store.uri)
    return PruneStage(
        before=state,
        dense=state,
        config=after,
        windows_key=stored.key,
        shard_count=SHARDS,
        pattern=pattern,
        sparsity=sparsity,
        solver=Solver(name=solver, rows=ROWS, refit=refit_steps),
        recovery=recovery,
        dtype="float32",
        device="cpu",
        threads=1,
        shares=(),
        norms=None,
        key_prefix="runs/test/blocks",
    )


def streamed(stage: PruneStage) -> list[dict[str, torch.Tensor]]:
    """What the engine does, in one process."""
    store = open_store(stage.before.store)
    return [safetensors.torch.load(store.get(stored.key)) for stored in blocks_alone(stage)]


@torch.inference_mode()
def reference(stage: PruneStage) -> list[dict[str, torch.Tensor]]:
    """The same on a whole model in memory: transformers' own forward, plain loops, no streaming, each input anew."""
    model = AutoModelForCausalLM.from_pretrained(stage.before.source, dtype=torch.float32, attn_implementation="sdpa")

    def grams_of(linears: dict[str, torch.nn.Linear]) -> dict[str, torch.Tensor]:
        grams = {name: torch.zeros(one.in_features, one.in_features) for name, one in linears.items()}
        hooks = [
            one.register_forward_pre_hook(lambda _, args, gram=grams[name]: add_inputs(gram, args[0]))
            for name, one in linears.items()
        ]
        for window in stage._tokens:
            model(window[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for gram in grams.values():
            mirror(gram)
        return grams

    blocks = []
    for index, layer in enumerate(model.model.layers):
        linears = {name: one for name, one in layer.named_modules() if isinstance(one, torch.nn.Linear)}
        grams = grams_of(linears)
        dense = {name: one.weight.data for name, one in linears.items()}
        if stage.pattern == "ffn":
            keep = stage.config["intermediate_size"]
            down = linears["mlp.down_proj"]
            kept, repaired = remove_channels(down.weight.data, grams["mlp.down_proj"], keep, stage.solver.damping)
            down.weight.data = repaired
            for name in ("mlp.gate_proj", "mlp.up_proj"):
                linears[name].weight.data = linears[name].weight.data[kept]
        else:
            solver = SOLVERS[stage.solver.name]
            for name, one in linears.items():
                if not isinstance(stage, DensePruneStage) and name.endswith(LEADERS):
                    grams |= grams_of(linears)  # behind what is pruned by now
                statistic = grams[name].diagonal() if solver.statistic == "diagonal" else grams[name]
                prepared = solver.prepare(statistic, stage.solver.damping)
                bounds = chunks(len(one.weight), stage.solver.rows, parse(stage.pattern).tile)
                rows = one.weight.data.split([stop - start for start, stop in bounds])
                solved = [solver.solve(chunk, prepared, stage.pattern, stage.sparsity) for chunk in rows]
                if steps := stage.solver.refit:
                    hessian = damped(grams[name], stage.solver.damping)
                    solved = [refit(old, new, hessian, steps) for old, new in zip(rows, solved, strict=True)]
                one.weight.data = torch.cat(solved)
        prefix = f"model.layers.{index}."
        blocks.append({prefix + name: tensor.clone() for name, tensor in layer.state_dict().items()})
        if isinstance(stage, DensePruneStage):  # what comes later sees nothing of it
            for name, one in linears.items():
                one.weight.data = dense[name]
    return blocks


@pytest.mark.parametrize(
    ("pattern", "sparsity", "solver", "steps"),
    [
        ("unstructured", 0.5, "sparsegpt", 0),
        ("2:4", 0.5, "sparsegpt", 5),
        ("2:4", 0.5, "wanda", 0),
        ("unstructured", 0.5, "wanda", 5),
        ("unstructured", 0.3, "magnitude", 0),
        ("unstructured", 0.3, "magnitude", 5),
        ("8x8", 0.4, "sparsegpt", 0),
        ("4x4", 0.5, "wanda", 0),
        ("ffn", 0.25, "sparsegpt", 0),
    ],
)
def test_streamed_equals_whole_model_reference(tmp_path, pattern, sparsity, solver, steps):
    stage = make_stage(tmp_path, pattern, sparsity, solver, refit_steps=steps)
    for ours, theirs in zip(streamed(stage), reference(stage), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].shape == theirs[name].shape
            assert torch.allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-3), name


@pytest.mark.parametrize(
    ("pattern", "sparsity", "solver"),
    [("2:4", 0.5, "sparsegpt"), ("unstructured", 0.5, "wanda"), ("ffn", 0.25, "admm")],
)
def test_propagating_the_dense_states_equals_the_reference_too(tmp_path, pattern, sparsity, solver):
    stage = DensePruneStage(**make_stage(tmp_path, pattern, sparsity, solver).__getstate__())
    for ours, theirs in zip(streamed(stage), reference(stage), strict=True):
        for name in ours:
            assert torch.allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-3), name


@given(st.integers(1, 400), st.integers(1, 12), st.integers(1, 8))
def test_chunks_are_few_and_alike_and_whole_tiles(rows, tiles, tile):
    found = chunks(rows, tiles * tile, tile)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == rows
    sizes = [stop - start for start, stop in found]
    assert len(found) == -(-rows // (tiles * tile))
    assert all(size % tile == 0 for size in sizes[:-1])
    assert max(sizes) <= tiles * tile


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "admm"])
def test_swaps_follow_the_solver_and_the_refit(tmp_path, name, steps):
    """Bit by bit on one Gram; later blocks would show rounding, which flips swaps that are nearly even."""
    stage = make_stage(tmp_path, "2:4", 0.5, name, layers=1, refit_steps=steps)
    stage.solver = stage.solver.model_copy(update={"swaps": 2})
    stage.setup()
    unit = next(unit for unit in stage.units() if unit.linear == "mlp.down_proj")
    shards = {shard: stage.open_shard(shard) for shard in range(stage.shard_count)}
    (total,) = totals(stage.statistics(0, shards, [unit.group]), [unit.group], stage.shard_count).values()
    linear, found = stage.solve(0, unit, stage.prepare(unit.group, total.copy()))
    gram = completed(total, "cpu")
    weight = Checkpoint(stage.before).read_linear_rows(0, unit.linear, unit.start, unit.stop)
    solved = SOLVERS[name].solve(weight, SOLVERS[name].prepare(gram, stage.solver.damping), "2:4", 0.5)
    hessian = damped(gram, stage.solver.damping)
    solved = refit(weight, solved, hessian, steps)
    swapped = swap(weight, solved, hessian, parse("2:4"), 2)
    assert linear == unit.linear
    assert torch.equal(found, swapped)
    assert not torch.equal((solved == 0), (swapped == 0)), "the case shows nothing"


def test_a_second_stage_starts_from_the_first_ones_blocks(tmp_path):
    stage = make_stage(tmp_path, "unstructured", 0.3)
    streamed(stage)
    store = open_store(stage.before.store)
    blocks = tuple(
        store.put(f"copy/{i}.safetensors", store.get(f"{stage.key_prefix}/{i:05d}.safetensors")) for i in range(3)
    )
    stage.before = stage.before.model_copy(update={"blocks": blocks})
    stage.sparsity = 0.5
    stage.__dict__.pop("_decoder", None)
    for tensors in streamed(stage):
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                zeros = (tensor == 0).double().mean().item()
                assert zeros == pytest.approx(0.5, abs=1e-3), name


def test_a_narrowed_block_runs_with_the_new_config(tmp_path):
    stage = make_stage(tmp_path, "ffn", 0.25)
    blocks = streamed(stage)
    assert blocks[0]["model.layers.0.mlp.down_proj.weight"].shape == (64, 96)
    checkpoint = Checkpoint(stage.before.model_copy(update={"config": stage.config}))
    assert Decoder(checkpoint, torch.float32, LENGTH).linears(0)[-1].columns == 96
