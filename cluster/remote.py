"""Runs handed functions as Ray tasks, some at a time, and brings back their results in order."""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from cluster.errors import Cancelled, Unavailable
from cluster.freed import giving_back
from cluster.gangs import shortage
from cluster.losses import AGAIN, ours
from cluster.sums import spread

Item = TypeVar("Item")

RETRIES = 3
DRIVER_CPUS = "KARIKOMI_DRIVER_CPUS"  # variable of a submitted driver: the CPUs that it holds on its node
LOOK_AGAIN = 0.5  # seconds between looks at `stop`
ROOM_WITHIN = 300.0  # seconds in which a lost node may come back or be replaced


@ray.remote(max_retries=RETRIES)
def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    with giving_back():
        return function(*arguments)


def call_each(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    cpus: float,
    gpus: float = 0,
    stop: Callable[[], bool] = lambda: False,
    on_done: Callable[[int, int], None] = lambda done, total: None,
    stuck_after: float = math.inf,
) -> list[Any]:
    """Calls `function` once per argument tuple, each in a task of its own.

    Args:
        function: importable on the workers; must give the same result when called twice.
        arguments: one tuple per call.
        cpus: CPUs that each call takes.
        gpus: GPUs that each call takes.
        stop: asked while waiting.
        on_done: told how many of how many calls are done.
        stuck_after: seconds; when none of the calls ends in so long, something hangs.

    Raises:
        Unavailable: no node is big enough (any more), workers were lost again and again, or something hangs.
        Cancelled: `stop` said so.
        KarikomiError: as raised by the function.
    """
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    if not _fits(bundle):
        raise Unavailable(shortage(bundle, 1, ray.cluster_resources(), ray.available_resources()))
    tasks = [_call.options(num_cpus=cpus, num_gpus=gpus).remote(function, *one) for one in arguments]
    waiting = list(tasks)
    moved = roomy = time.monotonic()
    try:
        while waiting:
            if stop():
                raise Cancelled("stopped")
            done, waiting = ray.wait(waiting, num_returns=1, timeout=LOOK_AGAIN)
            ray.get(done)
            if done:
                on_done(len(tasks) - len(waiting), len(tasks))
            now = time.monotonic()
            moved = now if done else moved
            roomy = now if done or _fits(bundle) else roomy
            if now - roomy > ROOM_WITHIN:
                raise Unavailable(shortage(bundle, 1, ray.cluster_resources(), ray.available_resources()), AGAIN)
            if now - moved > stuck_after:
                raise Unavailable(f"none of {len(waiting)} tasks ended in {stuck_after:g} s: something hangs", AGAIN)
        return ray.get(tasks)
    except RayError as error:
        raise ours(error, f"{getattr(function, '__name__', 'a task')} ({RETRIES + 1} times over)") from error
    finally:
        for task in waiting:
            with suppress(RayError):  # Ray itself may be what is gone
                ray.cancel(task, force=True)


def share_out(items: Sequence[Item], workers: int) -> list[list[Item]]:
    """Neighbouring items for each worker, as even as can be; there are no more shares than items."""
    return [[items[one] for one in own] for own in spread(len(items), min(workers, len(items)))]


def _fits(bundle: dict[str, float]) -> bool:
    return any(all(node.get(name, 0) >= amount for name, amount in bundle.items()) for node in _nodes())


def largest_node_cpus() -> int:
    """CPU slots that one task can have: those of the largest node, less what this driver holds there itself."""
    own, held = ray.get_runtime_context().get_node_id(), float(os.environ.get(DRIVER_CPUS, 0))
    slots = [
        node["Resources"].get("CPU", 0) - (held if node["NodeID"] == own else 0)
        for node in ray.nodes()
        if node["Alive"]
    ]
    return int(max(slots))


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
