"""Tuning with real DeepSpeed ranks: masks hold exactly, bytes are the same again, numbers are those of a plain loop."""

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from models_for_tests import write_tiny_model

from cluster.errors import Cancelled, KarikomiError, Unavailable
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.data.windows import Windows, to_parquet
from workflows.models.checkpoint import Checkpoint, block_file
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.pruning.patterns import keep_mask
from workflows.recipe import Tune
from workflows.tuning import masks
from workflows.tuning.objective import Objective, token_losses
from workflows.tuning.tune import TuneWork, batches, learning_rate, tune, tune_rank

STEPS, LENGTH = 5, 32


@pytest.fixture(scope="module")
def embedded_ray():
    with session(ClusterSpec(), cpus=2):
        yield


def make_work(tmp_path, **settings) -> TuneWork:
    """A tiny model whose linears are 2:4 sparse, its dense teacher, and text with a pattern to learn."""
    directory = write_tiny_model(tmp_path / "model", "llama", layers=2, dtype="float32")
    config = json.loads((directory / "config.json").read_text())
    store = open_store(str(tmp_path / "store"))
    dense = ModelState(source=str(directory), source_digest="0" * 64, config=config, store=store.uri)
    blocks = []
    for number in range(2):
        tensors = {
            name: one * keep_mask(one.abs(), "2:4", 0.5, per_row=True) if one.ndim == 2 else one
            for name, one in Checkpoint(dense).read_block(number)
        }
        blocks.append(store.put(f"pruned/{number}", block_file(f"model.layers.{number}.", tensors)))
    tokens = np.tile(np.arange(5, 5 + LENGTH, dtype=np.int32), (6, 1)) + np.arange(6, dtype=np.int32)[:, None]
    windows = store.put("windows", to_parquet({"tuning": Windows(tokens=tokens, slices=["all"] * 6)}))
    return TuneWork(
        student=dense.model_copy(update={"blocks": tuple(blocks)}),
        teacher=dense,
        windows_key=windows.key,
        tune=Tune(steps=STEPS, learning_rate=0.003, weight_decay=0.1, **settings),
        steps=STEPS,
        key_prefix="tuned",
        dtype="float32",
        device="cpu",
        threads=1,
        seed=0,
    )


def run(work: TuneWork, stop=lambda: False):
    return tune(work, lambda *progress: None, stop)


def tensors_of(work: TuneWork, blocks) -> dict[str, torch.Tensor]:
    store = open_store(work.student.store)
    return {name: one for block in blocks for name, one in safetensors.torch.load(store.get(block.key)).items()}


def plain_loop(work: TuneWork) -> list[float]:
    """One process, no DeepSpeed: masked gradients, clipping, AdamW."""
    student, teacher = (load_model(state, torch.float32) for state in (work.student, work.teacher))
    layers = list(student.model.layers)
    for layer in layers:
        layer.requires_grad_(True)
        masks.hold(layer, masks.pruned_positions(layer))
    trained = [one for one in student.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=work.tune.weight_decay, foreach=False)
    objective = Objective(student, teacher, work.tune.distill_weight)
    tokens = np.tile(np.arange(5, 5 + LENGTH), (6, 1)) + np.arange(6)[:, None]
    losses = []
    for step, chosen in enumerate(batches(6, work.tune.batch, work.steps, 1, 0, work.seed), 1):
        optimizer.param_groups[0]["lr"] = learning_rate(step, work.steps, work.tune)
        total = objective(torch.from_numpy(tokens[chosen]))[0]
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(total.item())
    return losses


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_keep_every_zero_and_lower_the_loss(embedded_ray, tmp_path, zero):
    work = make_work(tmp_path, zero=zero, ranks=2)
    tuned = run(work)
    before, after = (tensors_of(work, blocks) for blocks in (work.student.blocks, tuned.blocks))
    assert before.keys() == after.keys()
    for name, one in before.items():
        assert not torch.equal(one, after[name]), f"{name} was not tuned"
        if one.ndim == 2:
            assert torch.equal(one == 0, after[name] == 0), name
    assert tuned.losses[-1].total < tuned.losses[0].total


@pytest.mark.slow
def test_the_same_work_gives_the_same_bytes_also_when_a_rank_is_killed(embedded_ray, tmp_path):
    work = make_work(tmp_path, zero=2, ranks=2)
    first = [block.sha256 for block in run(work).blocks]
    killed = KilledOnce(**work.__dict__, marker=str(tmp_path / "killed"))
    assert [block.sha256 for block in tune(killed, lambda *_: None, lambda: False, loop=dying_rank).blocks] == first
    assert Path(killed.marker).exists(), "no rank was killed, so this test showed nothing"


@dataclass(frozen=True)
class KilledOnce(TuneWork):
    """The real work; rank 1 is killed without a word at its first step, once."""

    marker: str = ""


def dying_rank(work: KilledOnce, board) -> None:
    if torch.distributed.get_rank() == 1 and not Path(work.marker).exists():
        Path(work.marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    tune_rank(work, board)


def test_one_rank_equals_a_plain_loop(embedded_ray, tmp_path):
    work = make_work(tmp_path, zero=1, ranks=1)
    assert [one.total for one in run(work).losses] == pytest.approx(plain_loop(work), rel=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_one_clear_error(embedded_ray, tmp_path):
    work = make_work(tmp_path, ranks=1)
    store = open_store(work.student.store)
    broken = {name: one * torch.inf for name, one in Checkpoint(work.student).read_block(0)}
    blocks = (store.put("broken", block_file("model.layers.0.", broken)), *work.student.blocks[1:])
    with pytest.raises(KarikomiError, match=r"the loss is nan at step 1 of 5\nLower tune.learning_rate"):
        run(replace(work, student=work.student.model_copy(update={"blocks": blocks})))


@pytest.mark.slow
def test_a_stop_is_heard(embedded_ray, tmp_path):
    work = replace(make_work(tmp_path, ranks=1), steps=100_000)
    with pytest.raises(Cancelled):
        run(work, stop=lambda: True)


def test_more_ranks_than_there_is_room_for_are_refused_at_once(embedded_ray, tmp_path):
    with pytest.raises(Unavailable, match=r"CPU: asked 64 x 1, cluster has 2"):
        run(make_work(tmp_path, ranks=64))


def test_chunked_losses_and_gradients_are_those_of_the_whole(tmp_path):
    work = make_work(tmp_path)
    student, teacher = (load_model(state, torch.float32) for state in (work.student, work.teacher))
    student.model.layers.requires_grad_(True)
    tokens = torch.randint(3, 200, (3, 100), generator=torch.Generator().manual_seed(0))
    chunked = Objective(student, teacher, 0.3)(tokens)
    chunked[0].backward()
    gradient = student.model.layers[0].mlp.down_proj.weight.grad.clone()
    student.zero_grad()
    hidden = student.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    wanted = teacher.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    lm, kl = token_losses(teacher, hidden, tokens[:, 1:].flatten(), wanted) / hidden.shape[0]
    (0.7 * lm + 0.3 * kl).backward()
    assert chunked.tolist() == pytest.approx([0.7 * lm.item() + 0.3 * kl.item(), lm.item(), kl.item()], rel=1e-5)
    assert torch.allclose(gradient, student.model.layers[0].mlp.down_proj.weight.grad, atol=1e-7, rtol=1e-4)


def test_batches_are_a_function_of_seed_step_and_rank():
    ranks = [list(batches(5, 2, 4, 2, rank, seed=7)) for rank in (0, 1)]
    again = list(batches(5, 2, 4, 2, 0, seed=7))
    assert all((one == two).all() for one, two in zip(ranks[0], again, strict=True))
    seen = np.concatenate([np.concatenate([a, b]) for a, b in zip(*ranks, strict=True)])
    assert sorted(seen[:5]) == sorted(seen[5:10]) == [0, 1, 2, 3, 4]


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, Tune(steps=100, learning_rate=1.0, warmup=0.1)) for step in range(1, 101)]
    assert rates[9] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.1)


def test_a_weight_that_came_back_is_an_error():
    with pytest.raises(KarikomiError, match="block 3: w: 1 pruned weights came back"):
        masks.verify({"w": torch.tensor([[0.0, 1.0]])}, {"w": torch.tensor([[True, True]])}, 3)
