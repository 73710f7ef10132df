"""Scoring and allocation as a run takes them, on a real Ray: the target is met, nothing is done twice, same bits always."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import Cancelled
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.allocating import Allocating, Mix, Predictions, Scores, Shares, Weights
from workflows.data.windows import Windows, to_parquet
from workflows.events import Advanced, StepEnded
from workflows.gradient_files import read_norms
from workflows.models.checkpoint import Checkpoint
from workflows.models.state import ModelState
from workflows.recipe import Recipe
from workflows.scored import BlockScores
from workflows.stages import prune
from workflows.steps import Journal
from workflows.units import MIDDLE

LENGTH, WINDOWS, TARGET = 32, 8, 0.6
SLICES = ["code"] * 5 + ["prose"] * 3
MEASURED = {"policy": "measured", "windows": 3, "width": 0.3}
SEARCH = {"policy": "evolve", "generations": 3, "children": 3, "windows": 3, "width": 0.3}


pytestmark = pytest.mark.usefixtures("embedded_ray")


@pytest.fixture(scope="module")
def model(trained_model, tmp_path_factory):
    return ModelState(
        source=str(trained_model),
        source_digest="0" * 64,
        config=json.loads((trained_model / "config.json").read_text()),
        store=str(tmp_path_factory.mktemp("allocating") / "store"),
    )


@pytest.fixture(scope="module")
def windows(model):
    tokens = np.random.default_rng(0).integers(4, model.config["vocab_size"], (WINDOWS, LENGTH)).astype(np.int32)
    content = to_parquet({"calibration": Windows(tokens=tokens, slices=SLICES)})
    return open_store(model.store).put("windows", content)


def recipe_for(model: ModelState, allocation, **more) -> Recipe:
    calibration = {"source": "builtin:python-docs", "windows": WINDOWS, "length": LENGTH, "part": [0, 0.2]}
    return Recipe.model_validate(
        {
            "model": model.source,
            "data": {"calibration": calibration, "shards": 3},
            "target": {"pattern": "unstructured", "sparsity": TARGET},
            "allocation": allocation,
            **more,
        }
    )


def steps_of(
    model,
    windows,
    allocation,
    run: str,
    workers=2,
    before=None,
    listener=None,
    stop=lambda: False,
    target=TARGET,
    **more,
) -> Allocating:
    journal = Journal(open_store(model.store), run, listener or (lambda event: None))
    spec = ClusterSpec(workers=workers, wait_seconds=60)
    recipe, how = recipe_for(model, allocation, **more), {"windows": windows.sha256}
    return Allocating(recipe, spec, journal, lambda: None, stop, 1, before or model, windows, target, how)


def allot(*arguments, **more) -> Shares:
    return steps_of(*arguments, **more).shares()


def results(model: ModelState, run: str, step: str) -> list[dict]:
    store = open_store(model.store)
    records = [store.get_json(key) for key in store.keys(f"runs/{run}/steps/")]
    return [record["result"] for record in records if record["step"] == step]


def removed(model: ModelState, shares: Shares) -> float:
    sizes = {name: np.prod(shape) for name, shape in Checkpoint(model).shapes().items()}
    taken = {
        f"model.layers.{block}.{name}.weight": share for block, own in enumerate(shares) for name, share in own.items()
    }
    return sum(sizes[name] * share for name, share in taken.items()) / sum(sizes[name] for name in taken)


@pytest.fixture(scope="module")
def allotted(model, windows):
    """The shares of every policy, in one run, in which what they have in common is done once."""
    return {
        name: allot(model, windows, policy, "run")
        for name, policy in {"owl": "owl", "composite": "composite", "measured": MEASURED, "evolve": SEARCH}.items()
    }


@pytest.mark.parametrize("policy", ["owl", "composite", "measured", "evolve"])
def test_every_policy_meets_the_target_with_shares_that_differ(model, allotted, policy):
    found = [share for block in allotted[policy] for share in block.values()]
    assert len(found) == 3 * 7
    assert removed(model, allotted[policy]) == pytest.approx(TARGET, abs=1e-9)
    assert max(found) - min(found) > 0.02


def test_policies_share_what_they_have_in_common(model, allotted):
    steps = ("gradients", "score", "predict", "weigh", "mix", "evolve", "allocate")
    done = [len(results(model, "run", step)) for step in steps]
    assert done == [1, 3, 1, 1, 1, 1, 4]  # inputs alone; without levels; with levels


def test_the_pruned_model_has_the_zeros_that_were_allotted_and_a_second_stage_keeps_them(model, windows, allotted):
    recipe, journal = recipe_for(model, "composite"), Journal(open_store(model.store), "run", lambda event: None)
    shares, spec = allotted["composite"], ClusterSpec(wait_seconds=60)

    def work(work):
        return prune(
            work, model, model, model.config, windows, recipe, TARGET, shares, None, spec, lambda: False
        )  # fmt: skip

    state = journal.step("prune", {}, ModelState, work)
    checkpoint, zeros, weights = Checkpoint(state), 0, 0
    for block, own in enumerate(shares):
        tensors = dict(checkpoint.read_block(block))
        for name, share in own.items():
            weight = tensors[f"{name}.weight"]
            gone = weight.numel() - int(weight.count_nonzero())
            assert gone / weight.numel() == pytest.approx(share, abs=2e-3)
            zeros, weights = zeros + gone, weights + weight.numel()
    assert zeros / weights == pytest.approx(TARGET, abs=1e-3)
    later = allot(model, windows, "owl", "second", before=state, target=0.7)
    assert removed(model, later) == pytest.approx(0.7, abs=1e-9)
    for first, second in zip(shares, later, strict=True):
        assert all(second[name] >= share - 2e-3 for name, share in first.items())


def judging(model, windows):
    """The run's units, and what its policies judge mixes with."""
    store = open_store(model.store)
    scores = [Scores.model_validate(one) for one in results(model, "run", "score")]
    (levelled,) = (one for one in scores if BlockScores.model_validate_json(store.get(one.blocks[0].key)).levels)
    (predicted,) = (Predictions.model_validate(one) for one in results(model, "run", "predict"))
    steps = steps_of(model, windows, MEASURED, "run")
    return steps._judge(SimpleNamespace(store=store), levelled, predicted)


def test_a_search_is_never_worse_than_the_mix_it_began_with(model, windows, allotted):
    store = open_store(model.store)
    kept = [key for key in sorted(store.keys("runs/run/scores/")) if key.endswith(".mix.json")]
    judged = [Mix.model_validate(one).divergence for one in results(model, "run", "mix")]
    judged += [Mix.model_validate(store.get_json(key)).divergence for key in kept]
    assert len(judged) == 1 + SEARCH["generations"]
    assert judged == sorted(judged, reverse=True)
    (found,) = (Mix.model_validate(one) for one in results(model, "run", "evolve"))
    units, judge = judging(model, windows)
    assert found.divergence == judged[-1] == judge([tuple(units.by_block(found.levels))], range(WINDOWS)).item()
    assert min(Weights.model_validate(results(model, "run", "weigh")[0]).alone) > 0


def test_a_measured_mix_is_never_worse_than_the_same_for_all(model, windows, allotted):
    (chosen,) = (Mix.model_validate(one) for one in results(model, "run", "mix"))
    (weights,) = (Weights.model_validate(one) for one in results(model, "run", "weigh"))
    units, judge = judging(model, windows)
    mixes = units.mixes(weights.alone)
    assert (mixes[0] == MIDDLE).all()
    assert len({one.tobytes() for one in mixes}) == len(mixes), "every step leads on"
    judged = judge([tuple(units.by_block(one.tolist())) for one in mixes], range(WINDOWS))
    assert chosen.divergence == judged.min()
    assert chosen.levels == tuple(mixes[judged.argmin()])


def test_windows_that_sort_mixes_out_are_of_every_slice(model, allotted):
    store = open_store(model.store)
    records = [store.get_json(key) for key in store.keys("runs/run/steps/")]
    (weighed,) = (record["inputs"] for record in records if record["step"] == "weigh")
    assert weighed["judged"] == [0, 5, 1]


def test_the_table_of_a_stage_can_be_queried(model, allotted):
    found = Scores.model_validate(results(model, "run", "score")[-1])
    tables = [one["table"]["key"] for one in results(model, "run", "score") if one["table"]]
    assert set(tables) == {"runs/run/scores/1.parquet"}
    read = pq.read_table(io.BytesIO(open_store(model.store).get(tables[0])))
    assert sum(part is None for part in read["part"].to_pylist()) == 3 * 7 == len(found.blocks) * 7
    tokens, predicted = (int(read.schema.metadata[name]) for name in (b"tokens", b"predicted"))
    assert (tokens, predicted) == (WINDOWS * LENGTH, WINDOWS * (LENGTH - 1))


@pytest.mark.slow
def test_one_worker_gives_the_shares_of_two(model, windows, allotted):
    assert allot(model, windows, SEARCH, "one", workers=1) == allotted["evolve"]


@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_step_goes_on_and_ends_the_same(model, windows, allotted):
    did, seen = set(), []

    def stop():
        """Once in each step, after it got somewhere."""
        last = seen[-1]
        if isinstance(last, Advanced) and last.name not in did and 0 < last.done < last.total:
            did.add(last.name)
            return True
        return False

    for _ in range(7):  # six steps advance
        try:
            assert allot(model, windows, SEARCH, "stopped", listener=seen.append, stop=stop) == allotted["evolve"]
            break
        except Cancelled:
            pass
    assert {"gradients", "score", "evolve"} <= did
    seen.clear()
    assert allot(model, windows, SEARCH, "stopped", listener=seen.append) == allotted["evolve"]
    assert all(isinstance(event, StepEnded) and event.resumed for event in seen)


def test_keys_of_steps_hold_what_they_always_held_where_tokens_are_not_weighed(model, allotted):
    """Stores of earlier runs go on: what is new is part of a key only where it is asked for."""
    store = open_store(model.store)
    inputs = {}
    for key in store.keys("runs/run/steps/"):
        record = store.get_json(key)
        inputs.setdefault(record["step"], []).append(record["inputs"])
    assert [set(one) for one in inputs["gradients"]] == [{"windows"}]
    for one in inputs["score"]:
        assert set(one) == {"windows", "gradients", "levels", "solver"}
        assert one["gradients"] is None or set(one["gradients"]) == {"stored", "tokens", "loss"}
    judged = {"windows", "scores", "sparsity", "judged"}
    assert [set(one) for one in inputs["weigh"]] == [judged]
    assert [set(one) for one in inputs["mix"]] == [judged | {"weights", "confirmed"}]
    assert [set(one) for one in inputs["evolve"]] == [{"windows", "scores", "sparsity", "allocation", "start"}]
    for one in inputs["allocate"]:
        assert set(one) == {"windows", "scores", "sparsity", "allocation", "mix"}


@pytest.fixture(scope="module")
def weighed(model, windows):
    """Norms of a pass that was stopped once and gone on with, by two workers."""
    seen, stopped = [], []

    def stop():
        last = seen[-1]
        if not stopped and isinstance(last, Advanced) and last.done > 3:
            stopped.append(last)
        return len(stopped) == 1 and seen[-1] is stopped[0]

    steps = steps_of(
        model, windows, "uniform", "weighed", listener=seen.append, stop=stop, token_weights="gradient"
    )  # fmt: skip
    with pytest.raises(Cancelled):
        steps.norms()
    assert results(model, "weighed", "gradients") == []
    return steps.norms()


@pytest.mark.slow
def test_norms_are_the_same_on_one_worker_and_after_a_stop(model, windows, weighed):
    one = steps_of(model, windows, "uniform", "weighed-one", workers=1, token_weights="gradient")
    assert one.norms().sha256 == weighed.sha256
    assert one.shares() == ()
    for block in range(3):
        norms = read_norms(model.store, weighed.key, block)
        assert norms.shape == (WINDOWS * LENGTH,)
        assert norms.view(WINDOWS, LENGTH)[:, :-1].min() > 0
    plain = steps_of(model, windows, "uniform", "weighed-one")
    assert (plain.norms(), plain.shares()) == (None, ())
    assert len(results(model, "weighed-one", "gradients")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["owl", "composite"])
def test_one_gradient_pass_serves_weights_and_allocation(model, windows, weighed, allotted, policy):
    steps = steps_of(model, windows, policy, "weighed", token_weights="gradient")
    shares = steps.shares()
    assert steps.norms() == weighed
    assert removed(model, shares) == pytest.approx(TARGET, abs=1e-9)
    assert shares != allotted[policy]
    assert len(results(model, "weighed", "gradients")) == 1
    seen = []
    assert allot(model, windows, policy, "weighed", listener=seen.append, token_weights="gradient") == shares
    assert all(isinstance(event, StepEnded) and event.resumed for event in seen)
