"""What Ray raises, on a real Ray, and what becomes of it."""

import os
import signal

import pytest
import ray
from ray.exceptions import LocalRayletDiedError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from cluster.errors import InputError, Unavailable
from cluster.losses import MachinesLost, ours
from cluster.remote import call_each
from cluster.session import session
from cluster.spec import ClusterSpec


@pytest.fixture(scope="module")
def embedded_ray():
    with session(ClusterSpec(), cpus=2):
        yield


@ray.remote(max_restarts=0)
class Dies:
    def now(self):
        os.kill(os.getpid(), signal.SIGKILL)


@ray.remote(max_retries=0)
def use(value):
    return value


@ray.remote(max_retries=0)
def fails(error):
    raise error


def what_is_raised(reference) -> RayError:
    with pytest.raises(RayError) as caught:
        ray.get(reference)
    return caught.value


def test_a_dead_workers_result_that_a_task_waited_for_is_a_loss_and_not_the_tasks_fault(embedded_ray):
    error = what_is_raised(use.remote(use.remote(Dies.remote().now.remote())))
    meant = ours(error, "block 3 of 9")
    assert isinstance(meant, MachinesLost)
    assert meant.exit_code == 75
    assert meant.message.startswith("block 3 of 9: ActorDiedError: ")
    assert "\n" not in meant.message
    assert "same command" in meant.hint


def test_an_error_of_ours_comes_back_as_it_is_from_any_depth(embedded_ray):
    meant = ours(what_is_raised(use.remote(fails.remote(InputError("this field", "do that")))), "block 0 of 1")
    assert (type(meant), meant.message, meant.hint) == (InputError, "this field", "do that")


def test_a_fault_in_the_code_stays_what_it_is(embedded_ray):
    error = what_is_raised(fails.remote(ValueError("a bug")))
    assert ours(error, "block 0 of 1") is error


@pytest.mark.parametrize("error", [ObjectStoreFullError("no room"), OutOfDiskError("no room")])
def test_what_other_machines_would_not_change_is_not_tried_on_them(error):
    for one in (error, RayTaskError("statistics", "", error)):
        meant = ours(one, "block 0 of 1")
        assert type(meant) is Unavailable
        assert "full" in meant.message
        assert "RAY_TMPDIR" in meant.hint
    assert type(ours(LocalRayletDiedError(), "block 0 of 1")) is Unavailable


def hang() -> None:
    signal.pause()


def test_tasks_that_hang_are_given_up(embedded_ray):
    with pytest.raises(Unavailable, match=r"none of 1 tasks ended in 1 s: something hangs"):
        call_each(hang, [()], cpus=1, stuck_after=1.0)
