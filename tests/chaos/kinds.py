"""All classes of faults: what they are, which seeds belong to the whole suite, and where they can run together."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from tally import Shown
from world import World


@dataclass(frozen=True)
class Kind:
    """One class of fault.

    Attributes:
        title: for the table.
        function: "module.function", given a seed and a world; raises when the oracle is not content.
        seeds: how many belong to the whole suite.
        where: cases of one place share a world; a world has one Ray at most.
        mounts: it needs the right to mount a file system.
    """

    title: str
    function: str
    seeds: int
    where: Literal["stores", "engine", "nodes", "alone", "runs"]
    mounts: bool = False

    def run(self, seed: int, world: World) -> Shown:
        """One disturbed run."""
        module, _, name = self.function.partition(".")
        function: Callable[[int, World], Shown] = getattr(import_module(module), name)
        return function(seed, world)


KINDS = {
    "publisher-directory": Kind(
        "publisher killed at each file operation, directory", "store_faults.publisher_killed_directory", 80, "stores"
    ),
    "publisher-s3": Kind(
        "publisher killed before and after each request, S3", "store_faults.publisher_killed_s3", 52, "stores"
    ),
    "network": Kind("network broken, publish and pull", "store_faults.broken_network", 30, "stores"),
    "disk": Kind("disk full, publish", "store_faults.disk_full", 30, "stores", mounts=True),
    "worker": Kind("worker or task killed within a piece of work", "engine_faults.worker_struck", 10, "engine"),
    "worker-outside": Kind("worker process killed at a random time", "engine_faults.worker_shot", 10, "engine"),
    "worker-frozen": Kind("worker or task frozen within a piece of work", "engine_faults.worker_frozen", 6, "engine"),
    "driver": Kind("driver killed while pruning", "engine_faults.driver_killed", 6, "engine"),
    "two-drivers": Kind("two drivers prune one run", "engine_faults.two_drivers", 4, "engine"),
    "engine-network": Kind("network broken, pruning", "engine_faults.engine_network", 6, "engine"),
    "engine-disk": Kind("disk full, pruning", "engine_faults.engine_disk_full", 8, "engine", mounts=True),
    "node": Kind("raylet of a node killed", "node_faults.node_killed", 5, "nodes"),
    "node-frozen": Kind("raylet of a node frozen, thawed later", "node_faults.node_frozen", 5, "nodes"),
    "object-store": Kind(
        "Ray's object store and its disk full", "node_faults.object_store_full", 3, "alone", mounts=True
    ),
    "run": Kind("whole run: worker, rank or controller, and driver killed", "run_faults.run_struck", 8, "runs"),
    "two-runs": Kind("whole run, twice at once", "run_faults.two_runs", 3, "runs"),
    "run-disk": Kind("whole run, disk full", "run_faults.run_on_a_full_disk", 4, "runs", mounts=True),
}
