"""Gangs: the machines of a run, reserved together and given back together; what to do when they are lost."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import Cancelled, Unavailable
from cluster.losses import AGAIN, MachinesLost
from cluster.spec import ClusterSpec

log = logging.getLogger(__name__)

# How often Ray restarts a lost worker or repeats a lost task.
RETRIES = 5
# How many gangs in a row may be lost without finishing anything; then the run gives up, and can be resumed.
GANGS = 3
LOOK_AGAIN = 1.0  # seconds between looks: at whether the machines are there, and whether the user gave up waiting


@contextmanager
def gang(spec: ClusterSpec, cpus_per_worker: int, stop: Callable[[], bool]) -> Iterator[PlacementGroup]:
    """Reserves one bundle per worker, all or none, and gives them back at the end.

    Raises:
        Unavailable: they cannot be had within `spec.wait_seconds`; says what was asked and what there is.
        Cancelled: `stop` said so while waiting.
    """
    bundle = {"CPU": float(cpus_per_worker)}
    if spec.gpus_per_worker:
        bundle["GPU"] = spec.gpus_per_worker
    group = placement_group([bundle] * spec.workers, strategy="SPREAD")
    try:
        deadline = time.monotonic() + spec.wait_seconds
        while not group.wait(min(spec.wait_seconds, LOOK_AGAIN)):
            if stop():
                raise Cancelled("stopped while waiting for machines")
            if time.monotonic() > deadline:
                raise Unavailable(
                    shortage(bundle, spec.workers, ray.cluster_resources(), ray.available_resources()),
                    f"Ask for less (cluster.workers is {spec.workers}), or run it again when machines are free.",
                )
        yield group
    finally:
        remove_placement_group(group)


def shortage(bundle: dict[str, float], workers: int, total: dict[str, float], free: dict[str, float]) -> str:
    """What was asked, what there is and what is taken, in one sentence."""
    parts = [
        f"{name}: asked {workers} x {amount:g}, cluster has {total.get(name, 0):g}, free {free.get(name, 0):g}"
        for name, amount in bundle.items()
    ]
    return f"no room for {workers} workers ({'; '.join(parts)})"


def with_gangs(
    attempt: Callable[[PlacementGroup], None],
    done: Callable[[], int],
    goal: int,
    then: Callable[[], str],
    spec: ClusterSpec,
    cpus_per_worker: int,
    stop: Callable[[], bool],
) -> None:
    """Attempts with one gang of machines after another, until all is done.

    Args:
        attempt: works with a gang; MachinesLost when it cannot go on with this one.
        done: how much is done.
        goal: how much there is to do.
        then: what other machines do after a loss, for the log.
        spec: as for `gang`.
        cpus_per_worker: as for `gang`.
        stop: as for `gang`.

    Raises:
        Cancelled: `stop` said so.
        Unavailable: no machines within the time, or `GANGS` in a row were lost with nothing more done.
    """
    lost = 0
    while (begun := done()) < goal:
        try:
            with gang(spec, cpus_per_worker, stop) as group:
                attempt(group)
        except MachinesLost as error:
            lost = 0 if done() > begun else lost + 1
            if lost == GANGS:
                raise
            log.warning("%s; other machines %s", error.message, then())


def awaited(written: Any, group: PlacementGroup, spec: ClusterSpec, what: str) -> Any:
    """Waits for a block's result, but not for ever.

    Raises:
        MachinesLost: the gang is broken and not made whole again within `spec.wait_seconds`, or the block is not done
            within `spec.block_seconds`. Ray itself waits for ever in both cases: it notices dead processes and
            nodes, not a process that hangs, nor that nobody will bring another machine.
    """
    started = whole = time.monotonic()
    while True:
        done, _ = ray.wait([written], timeout=LOOK_AGAIN)
        if done:
            return ray.get(written)
        now = time.monotonic()
        if placement_group_table(group)["state"] == "CREATED":
            whole = now
        if now - whole > spec.wait_seconds:
            raise MachinesLost(f"{what}: a machine was lost and none took its place in {spec.wait_seconds:g} s", AGAIN)
        if now - started > spec.block_seconds:
            raise MachinesLost(f"{what}: not done in {spec.block_seconds:g} s, so something hangs", AGAIN)


def dismiss(workers: Sequence[Any]) -> None:
    """Ends workers at once."""
    for worker in workers:
        with suppress(RayError):  # Ray itself may be what is gone
            ray.kill(worker)


def by_node(group: PlacementGroup) -> list[list[int]]:
    """Numbers of the bundles that each node holds."""
    nodes: dict[str, list[int]] = {}
    for number, node in sorted(placement_group_table(group)["bundles_to_node_id"].items()):
        nodes.setdefault(node, []).append(number)
    return list(nodes.values())


def half_bundle(group: PlacementGroup, number: int = -1) -> dict[str, Any]:
    """Ray options for something that takes half of one worker's bundle: of bundle `number`, or of any."""
    bundle = group.bundle_specs[0]
    return {
        "num_cpus": bundle["CPU"] / 2,
        "num_gpus": bundle.get("GPU", 0) / 2,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, number, placement_group_capture_child_tasks=False
        ),
    }
