"""A group of ranks: what it gives, what it says, and what happens when a part of it dies. Real Ray Train, no model."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray
import torch
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from cluster.errors import Cancelled, InputError, Unavailable
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.training import RankLost, _readable, own_groups, train

PATIENCE = 120


@pytest.fixture(scope="module", autouse=True)
def embedded_ray():
    with session(ClusterSpec(), cpus=2):
        yield


@pytest.fixture(autouse=True)
def machines_are_given_back():
    yield
    deadline = time.monotonic() + PATIENCE
    while own_groups() or ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, f"still held: {own_groups()}, free {ray.available_resources()}"
        time.sleep(0.1)


def run(loop, argument, ranks=2, on_news=lambda news: None, stop=lambda: False):
    return train(loop, argument, ranks, 1, 0, on_news, stop)


def once(marker: str) -> bool:
    """True for the first process that asks."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def summing(argument, board) -> None:
    """Every rank adds its number; rank 0 tells and gives the sum."""
    rank = torch.distributed.get_rank()
    total = torch.tensor([rank + argument])
    torch.distributed.all_reduce(total)
    if rank == 0:
        ray.get(board.note.remote(step=1))
        ray.get(board.finish.remote(int(total)))


def refusing(argument, board) -> None:
    if torch.distributed.get_rank() == 1:
        raise InputError("rank 1 does not like it", "Give it something else.")
    torch.distributed.barrier()


def dying(marker, board) -> None:
    if torch.distributed.get_rank() == 1 and once(marker):
        os.kill(os.getpid(), signal.SIGKILL)
    summing(1, board)


def killing_the_board(marker, board) -> None:
    if torch.distributed.get_rank() == 0 and once(marker):
        ray.kill(board)
    summing(1, board)


def always_dying(argument, board) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def endless(argument, board) -> None:
    while not ray.get(board.note.remote(at=time.time())):
        time.sleep(0.05)


def test_ranks_work_together_and_rank_0_gives_the_result():
    told = []
    assert run(summing, 10, on_news=told.append) == 21
    assert told in ([], [{"step": 1}]), "news may come too late to be seen, never changed"


def test_a_users_error_in_any_rank_comes_out_as_it_is():
    with pytest.raises(InputError, match="rank 1 does not like it") as caught:
        run(refusing, None)
    assert caught.value.hint == "Give it something else."


@pytest.mark.slow
@pytest.mark.parametrize("loop", [dying, killing_the_board])
def test_a_group_that_lost_a_process_is_started_again(tmp_path, loop):
    marker = tmp_path / "died"
    assert run(loop, str(marker)) == 3
    assert marker.exists(), "nothing died, so this test showed nothing"


@pytest.mark.slow
def test_a_group_that_dies_again_and_again_is_given_up(monkeypatch):
    monkeypatch.setattr("cluster.training.ATTEMPTS", 2)
    with pytest.raises(Unavailable, match="ranks were lost 2 times over"):
        run(always_dying, None, ranks=1)


def test_a_rank_that_dies_while_its_group_starts_is_lost_too():
    error = ControllerError(WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize."))
    assert isinstance(_readable(error), RankLost)


def test_ranks_hear_a_stop():
    seen = threading.Event()
    with pytest.raises(Cancelled):
        run(endless, None, ranks=1, on_news=lambda news: seen.set(), stop=seen.is_set)


def test_what_can_never_fit_is_refused_at_once():
    with pytest.raises(Unavailable, match=r"CPU: asked 64 x 1, cluster has 2"):
        run(summing, 1, ranks=64)
