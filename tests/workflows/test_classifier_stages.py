"""What is done to a classifier's blocks, in one process: the same numbers as from the whole model, and no padding."""

import json

import numpy as np
import pytest
import torch
from classifiers_for_tests import ENCODERS, sentences, word_tokenizer, write_tiny_classifier
from test_blockwork import streamed
from test_importance import walked
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from cluster.alone import totals
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from cluster.sums import added
from workflows.blockwork import PruneStage
from workflows.data.windows import Windows, to_parquet
from workflows.divergence import Divergence
from workflows.gradient_files import put_gradients
from workflows.importance import GradientPass
from workflows.level_files import level_file
from workflows.memory import worker_memory
from workflows.models.checkpoint import Checkpoint
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.observing import completed
from workflows.pruning.patterns import verify
from workflows.recipe import Recipe, Recovery, Solver
from workflows.scoring.token_weights import token_weights
from workflows.tuning.objective import ClassObjective
from workflows.tuning.tune import batch_of

TEXTS, SHARDS = 10, 3
LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip


def texts(count: int = TEXTS) -> Windows:
    rows = sentences(count, 3)
    tokens = [np.array(one, dtype=np.int32) for one in word_tokenizer()([text for text, *_ in rows])["input_ids"]]
    return Windows(tokens=tokens, slices=[kind for *_, kind in rows], labels=[label for _, label, _ in rows])


@pytest.fixture(params=["bert"])
def base(request, tmp_path) -> dict:
    directory = write_tiny_classifier(tmp_path / "model", request.param, layers=3)
    config = json.loads((directory / "config.json").read_text())
    store = open_store(str(tmp_path / "store"))
    windows = store.put("windows", to_parquet({"calibration": texts()}))
    before = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=store.uri)
    return {
        "before": before, "windows_key": windows.key, "shard_count": SHARDS, "dtype": "float32", "device": "cpu",
        "threads": 1,
    }  # fmt: skip


def stage_of(base, pattern="unstructured", sparsity=0.5, solver="sparsegpt", recovery=None, **settings) -> PruneStage:
    config = base["before"].config
    after = config | ({"intermediate_size": int(64 * (1 - sparsity))} if pattern == "ffn" else {})
    return PruneStage(
        **base, dense=base["before"], config=after, pattern=pattern, sparsity=sparsity,
        solver=Solver(name=solver, rows=16, **settings), recovery=recovery, norms=None, shares=(), key_prefix="blocks",
    )  # fmt: skip


def whole(base) -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(base["before"].source, dtype=torch.float32).eval()


@pytest.mark.parametrize("base", ENCODERS, indirect=True)
@torch.no_grad()
def test_grams_are_those_of_the_whole_model_on_unpadded_sentences(base):
    stage, model = stage_of(base), whole(base)
    stage.setup()
    inputs: dict[str, list[torch.Tensor]] = {}
    layer = model.base_model.encoder.layer[0]
    for name in LINEARS:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0])
        )
    for tokens in stage._tokens:
        model(tokens[None])
    shards = {shard: stage.open_shard(shard) for shard in range(SHARDS)}
    groups = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    found = totals(stage.statistics(0, shards, groups), groups, SHARDS)
    assert sorted({unit.group for unit in stage.units()}) == sorted(groups)
    for name in groups:
        gram = completed(found[name], "cpu")
        seen = torch.cat(inputs[name])
        assert len(seen) == sum(map(len, stage._tokens)), "padding was counted"
        assert torch.allclose(gram, seen.T @ seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt", "admm"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("2:4", 0.5), ("8x8", 0.5)])
def test_every_solver_meets_every_pattern(base, solver, pattern, sparsity):
    for block, tensors in enumerate(streamed(stage_of(base, pattern, sparsity, solver))):
        for name in LINEARS:
            verify(tensors[f"bert.encoder.layer.{block}.{name}.weight"], pattern, sparsity)
        assert tensors.keys() == {
            f"bert.encoder.layer.{block}.{name}" for name, _ in Checkpoint(base["before"]).read_block(block)
        }


@pytest.mark.parametrize("recovery", [None, Recovery(steps=4, learning_rate=0.01)])
def test_channels_go_with_their_rows_and_biases(base, recovery):
    stage = stage_of(base, "ffn", 0.25, recovery=recovery)
    blocks = streamed(stage)
    for block, tensors in enumerate(blocks):
        prefix = f"bert.encoder.layer.{block}."
        assert tensors[prefix + "intermediate.dense.weight"].shape == (48, 32)
        assert tensors[prefix + "intermediate.dense.bias"].shape == (48,)
        assert tensors[prefix + "output.dense.weight"].shape == (32, 48)
    stored = tuple(open_store(base["before"].store).put(f"b/{n}", block_bytes(one)) for n, one in enumerate(blocks))
    after = base["before"].model_copy(update={"config": stage.config, "blocks": stored})
    assert torch.isfinite(load_model(after, torch.float32)(stage._tokens[0][None]).logits).all()


def block_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(tensors)


def test_recovery_brings_blocks_nearer_to_the_dense_model(base):
    def distance(recovery) -> float:
        stage = stage_of(base, sparsity=0.7, solver="wanda", recovery=recovery)
        blocks = streamed(stage)
        stored = tuple(open_store(base["before"].store).put(f"b/{n}", block_bytes(one)) for n, one in enumerate(blocks))
        after = load_model(base["before"].model_copy(update={"blocks": stored}), torch.float32)
        dense = load_model(base["before"], torch.float32)
        states = [[m.bert(one[None]).last_hidden_state for one in stage._tokens] for m in (after, dense)]
        return sum((a - b).square().sum().item() for a, b in zip(*states, strict=True))

    assert distance(Recovery(steps=24, learning_rate=0.02)) < 0.8 * distance(None)


def test_results_do_not_depend_on_which_worker_holds_which_shard(base):
    stage = stage_of(base)
    stage.setup()
    together = {shard: stage.open_shard(shard) for shard in range(SHARDS)}
    groups = ("attention.self.query", "output.dense")
    all_at_once = totals(stage.statistics(0, together, groups), groups, SHARDS)
    alone = [list(stage.statistics(0, {shard: stage.open_shard(shard)}, groups)) for shard in range(SHARDS)]
    for number, wanted in enumerate(all_at_once.values()):
        parts = {(shard, shard + 1): sums[number] for shard, sums in enumerate(alone)}
        assert np.array_equal(wanted, added(parts, (0, SHARDS)))


@pytest.mark.parametrize("base", ENCODERS, indirect=True)
def test_gradients_are_those_of_autograd_through_the_whole_model(base):
    work = GradientPass(**base, memory=0)
    found, model, data = walked(work), whole(base), texts()
    sums: dict[tuple[int, str], torch.Tensor] = {}

    def watch(key):
        def add(own):
            sums[key] = sums.get(key, 0) + own[0].square().sum(0)

        return lambda _, args, output: output.register_hook(add) and None

    for block, layer in enumerate(model.base_model.encoder.layer):
        for name in LINEARS:
            layer.get_submodule(name).register_forward_hook(watch((block, name)))
    loss = 0.0
    for number, tokens in enumerate(work._tokens):
        own = functional.cross_entropy(model(tokens[None]).logits, torch.tensor([data.labels[number]]))
        own.backward()
        loss += own.item()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.tokens == sum(map(len, data.tokens))
    for (block, name), total in sums.items():
        wanted = total / found.tokens
        torch.testing.assert_close(found.gammas[block][name], wanted, rtol=2e-3, atol=1e-6 * wanted.max().item())


def test_candidates_are_judged_over_the_classes(base):
    store = open_store(base["before"].store)
    tensors = [dict(Checkpoint(base["before"]).read_block(block)) for block in range(3)]
    name = "intermediate.dense"
    levels = tuple(
        store.put(f"levels/{n}", level_file({(name, 0): one[f"{name}.weight"] * 0.5})) for n, one in enumerate(tensors)
    )
    work = Divergence(**base, levels=levels, predicted={}, stride=8)
    work.setup()
    work.predicted = dict(enumerate(work.keep(range(TEXTS), "predicted")))
    assert list(work.positions) == [0]
    found = work.of(range(TEXTS), [({}, {}, {}), ({name: 0}, {}, {})])
    assert not found[:, 0].any()
    model, changed = whole(base), whole(base)
    changed.bert.encoder.layer[0].intermediate.dense.weight.data.mul_(0.5)
    for number, tokens in enumerate(work._tokens):
        p, q = (one(tokens[None]).logits.double().log_softmax(1) for one in (model, changed))
        assert found[number, 1] == pytest.approx(
            functional.kl_div(q, p, log_target=True, reduction="sum").item(), rel=1e-3, abs=1e-12
        )


@pytest.mark.parametrize("base", ["bert", "roberta"], indirect=True)
def test_padding_within_a_tuning_batch_changes_nothing(base):
    config = base["before"].config | {"hidden_dropout_prob": 0.5}
    student, teacher = (
        load_model(base["before"].model_copy(update={"config": config}), torch.float32) for _ in range(2)
    )
    student.base_model.encoder.layer[0].output.dense.weight.data.mul_(-20)
    data = texts(4)
    objective = ClassObjective(student, teacher, 0.5)
    together = objective(*batch_of(data, np.arange(4), config))
    alone = torch.stack([objective(*batch_of(data, np.array([one]), config)) for one in range(4)]).mean(0)
    assert torch.allclose(together, alone, atol=1e-6)
    assert together[2] > 0
    assert together[0].item() == pytest.approx((together[1] + together[2]).item() / 2)
    (own,) = {tuple(one.shape) for one in batch_of(data, np.arange(4), config)[:2]}
    assert own == (4, max(map(len, data.tokens)))


def test_memory_is_told_from_the_config(base):
    part = {"source": "a.tsv", "label": "label", "length": 16}
    roles = {
        "calibration": part | {"part": [0, 0.3], "windows": 8},
        "tuning": part | {"part": [0.3, 0.6]},
        "evaluation": part | {"part": [0.6, 1]},
    }
    recipe = Recipe.model_validate(
        {"model": "m", "data": roles, "target": {"pattern": "unstructured", "sparsity": 0.5}}
    )
    alone = ClusterSpec(workers=recipe.data.shards)
    memory = worker_memory(base["before"].config, recipe, alone)
    assert memory.grams == 4 * 64**2, "one turn's"
    dense = worker_memory(base["before"].config, recipe.model_copy(update={"propagate": "dense"}), alone)
    assert dense.grams == 4 * (32**2 + 32**2 + 32**2 + 64**2), "a block's"
    shared = worker_memory(base["before"].config, recipe, ClusterSpec(workers=1))
    assert shared.grams == 2 * 4 * 64**2, "one sum waits for another one"
    assert shared.activations == 4 * 8 * 16 * 32
    narrow = recipe.model_copy(update={"target": recipe.target.model_copy(update={"pattern": "ffn"})})
    assert worker_memory(base["before"].config, narrow, alone).grams == 4 * 64**2


def test_tokens_of_texts_of_any_lengths_are_weighed_by_their_gradients(base):
    stage = stage_of(base)
    found = walked(GradientPass(**base, memory=0, norms=True))
    weights = token_weights(found.norms[0])
    assert len(weights) == sum(map(len, stage._tokens))
    store = open_store(base["before"].store)
    weighed = PruneStage(**stage.__getstate__() | {"norms": put_gradients(store, "gradients", found)})
    weighed.setup()
    shards = {shard: weighed.open_shard(shard) for shard in range(SHARDS)}
    group = "attention.self.query"
    total = totals(weighed.statistics(0, shards, [group]), [group], SHARDS)[group]
    inputs = torch.cat([window[0] for shard in shards.values() for window in shard.hidden])
    wanted = inputs.T @ (inputs * weights[:, None])
    torch.testing.assert_close(completed(total, "cpu"), wanted, rtol=1e-4, atol=1e-4)
