"""Tokens weighed by their gradients: Grams are the explicit weighted sums, and without weights nothing changes."""

import pytest
import torch
from test_blockwork import LENGTH, SHARDS, WINDOWS, make_stage, streamed
from transformers import AutoModelForCausalLM

from cluster.alone import totals
from cluster.errors import InputError
from cluster.storage import open_store
from cluster.sums import added
from workflows.blockwork import DensePruneStage, PruneStage
from workflows.gradient_files import Importance, put_gradients, read_norms
from workflows.importance import check_norms
from workflows.observing import completed
from workflows.recipe import Recipe
from workflows.scored import ScoreStage
from workflows.scoring.gram import add_inputs, mirror
from workflows.scoring.token_weights import token_weights, weighed


def heavy_tailed(seed: int) -> torch.Tensor:
    """Norms [windows, length] over some orders of magnitude; the last tokens' are zero."""
    norms = torch.randn(WINDOWS, LENGTH, generator=torch.Generator().manual_seed(seed)).mul(2).exp()
    norms[:, -1] = 0
    return norms


def weigh(stage: PruneStage) -> PruneStage:
    """The same stage with norms for every block."""
    norms = [heavy_tailed(block) for block in range(stage.block_count)]
    found = Importance(1.0, WINDOWS * LENGTH, [{} for _ in norms], norms)
    stored = put_gradients(open_store(stage.before.store), "gradients.safetensors", found)
    return type(stage)(**stage.__getstate__() | {"norms": stored, "key_prefix": "runs/test/weighed"})


def gathered(stage) -> dict[str, torch.Tensor]:
    """Statistics of the inputs of block 1 (0 has that of the embedding alone), all shards added up."""
    stage.setup()
    groups = sorted({unit.group for unit in stage.units()})
    shards = {shard: stage.open_shard(shard) for shard in range(SHARDS)}
    if isinstance(stage, PruneStage) and not isinstance(stage, DensePruneStage):
        move = DensePruneStage(**stage.__getstate__())  # so that all see the same inputs
        passing = {shard: move.open_shard(shard) for shard in range(SHARDS)}
        move.advance(0, None, (), passing)
        for shard, one in passing.items():
            shards[shard].hidden = one.hidden
    else:
        stage.advance(0, None, (), shards)
    sums = totals(stage.statistics(1, shards, groups), groups, stage.shard_count)
    return {name: completed(total, "cpu") for name, total in sums.items()}


@torch.no_grad()
def inputs(stage, names) -> dict[str, torch.Tensor]:
    """What the linears of block 1 of the whole model read, [windows, length, in]."""
    model = AutoModelForCausalLM.from_pretrained(stage.before.source, dtype=torch.float32).eval()
    seen = {name: [] for name in names}
    for name in names:
        model.model.layers[1].get_submodule(name).register_forward_pre_hook(
            lambda _, args, own=seen[name]: own.append(args[0])
        )
    for window in stage._tokens:
        model(window[None], use_cache=False)
    return {name: torch.cat(own) for name, own in seen.items()}


def test_weights_have_mean_one_and_ask_for_no_scale():
    norms = heavy_tailed(0)
    weights = token_weights(norms)
    assert weights.shape == norms.shape
    assert weights.dtype == torch.float32
    assert weights.double().mean().item() == pytest.approx(1, rel=1e-6)
    assert torch.all(weights >= 0)
    torch.testing.assert_close(token_weights(norms * 1e-18), weights)
    order = norms.flatten().argsort()
    assert torch.all(weights.flatten()[order].diff() >= 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norms_that_are_not_finite_are_refused_and_the_block_and_the_field_are_named(value):
    broken = heavy_tailed(0)
    broken[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        token_weights(broken)
    with pytest.raises(InputError, match=r"token_weights: gradient .* block 1: .*not finite"):
        check_norms(Importance(1.0, 1, [], [heavy_tailed(0), broken]))


def test_norms_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match=r"all .* zero"):
        token_weights(torch.zeros(2, 3))


def test_a_weighed_gram_is_the_weighted_sum():
    x, weights = torch.randn(2, 5, 300), token_weights(heavy_tailed(0)[:2, :5])
    gram = torch.zeros(300, 300)
    add_inputs(gram, weighed(x, weights))
    wanted = torch.einsum("wt,wti,wtj->ij", weights.double(), x.double(), x.double())
    torch.testing.assert_close(mirror(gram).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [PruneStage, DensePruneStage, ScoreStage])
@pytest.mark.parametrize("solver", ["sparsegpt", "wanda"])
def test_the_statistics_of_every_stage_are_weighed(tmp_path, kind, solver):
    stage = weigh(make_stage(tmp_path, "2:4", 0.5, solver))
    state = stage.__getstate__()
    if kind is ScoreStage:
        base = {name: state[name] for name in ("before", "windows_key", "shard_count", "dtype", "device", "threads")}
        norms, solver_asked = state["norms"], state["solver"]
        stage = ScoreStage(**base, norms=norms, gammas=None, levels=(), solver=solver_asked, key_prefix="scores")
    else:
        stage = kind(**state)
    found = gathered(stage)
    assert len(found) == 4
    weights = token_weights(heavy_tailed(1)).double()
    for name, own in inputs(stage, found).items():
        wanted = torch.einsum("wt,wti,wtj->ij", weights, own.double(), own.double())
        got = found[name].double()
        torch.testing.assert_close(got, wanted if got.dim() == 2 else wanted.diagonal(), rtol=1e-3, atol=1e-3)


def test_without_weights_grams_have_the_bits_of_a_plain_sum(tmp_path):
    stage = make_stage(tmp_path, "2:4", 0.5)
    found = gathered(stage)
    for name, own in inputs(stage, found).items():
        grams = {}
        for shard, windows in enumerate(torch.tensor_split(own, SHARDS)):
            gram = torch.zeros(own.shape[-1], own.shape[-1])
            for window in windows:
                add_inputs(gram, window)
            grams[shard, shard + 1] = mirror(gram).numpy()
        assert torch.equal(found[name], torch.from_numpy(added(grams, (0, SHARDS)))), name


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.6), ("ffn", 0.25)])
def test_a_stage_with_weights_chooses_otherwise(tmp_path, pattern, sparsity):
    stage = make_stage(tmp_path, pattern, sparsity)
    plain, other = streamed(stage), streamed(weigh(stage))
    name = next(one for one in plain[1] if one.endswith("down_proj.weight"))
    assert plain[1].keys() == other[1].keys()
    assert not torch.equal(plain[1][name] != 0, other[1][name] != 0) or pattern == "ffn"
    assert not torch.equal(plain[1][name], other[1][name])


def test_norms_are_read_by_block_and_a_file_without_them_is_refused(tmp_path):
    stage = weigh(make_stage(tmp_path, "2:4", 0.5))
    for block in range(stage.block_count):
        assert torch.equal(read_norms(stage.before.store, stage.norms.key, block), heavy_tailed(block))
    bare = put_gradients(open_store(stage.before.store), "bare.safetensors", Importance(1.0, 1, [{"x": torch.ones(2)}]))
    with pytest.raises(InputError, match=r"bare\.safetensors does not hold the norms"):
        read_norms(stage.before.store, bare.key, 0)


def test_a_solver_that_reads_no_data_is_refused():
    fields = {"model": "m", "target": {"pattern": "2:4", "sparsity": 0.5}, "token_weights": "gradient"}
    with pytest.raises(ValueError, match=r"token_weights: gradient .* magnitude"):
        Recipe.model_validate(fields | {"solver": {"name": "magnitude"}})
    assert Recipe.model_validate(fields | {"solver": {"name": "magnitude", "refit": 3}}).needs_gradients
    assert not Recipe.model_validate(fields | {"token_weights": "equal"}).needs_gradients
