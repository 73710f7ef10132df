"""Faults of machines: several real raylets on this one, killed or frozen; a worker that hangs; a full object store."""

import json
import random
import signal
import threading
import time
from collections.abc import Callable

import psutil
import ray
from disturbed import Disturbed, disturbed, when_done
from engine_faults import ended, fresh_stage, hashes, run
from oracle import clear_refusal, nothing_lost
from ray.cluster_utils import Cluster
from small_disk import SmallDisk
from tally import Shown
from test_blockwork import make_stage
from world import World

from cluster.errors import Unavailable
from cluster.session import WORKER_PROCESSES
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.recipe import Solver

NODES = 2  # beside the head, which has no slots; each has room for the whole gang
# Ray notices a frozen node after more than a minute; here sooner, but not so soon that a busy machine seems dead.
QUICK = {"health_check_initial_delay_ms": 2000, "health_check_period_ms": 1000, "health_check_timeout_ms": 3000}
NOTICED_WITHIN = 120.0
SPEC = ClusterSpec(workers=2, wait_seconds=120, block_seconds=3600)
OBJECT_STORE = 80 << 20  # bytes; Ray takes no less


def cluster(world: World) -> Cluster:
    """A head and some nodes, started once per world; and a run on it that nobody disturbs."""
    if "cluster" not in world.kept:
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK | WORKER_PROCESSES},
        )
        world.enter(Closing(made))
        for _ in range(NODES):
            made.add_node(num_cpus=2)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        made.wait_for_nodes()
        for _ in range(2):
            stage = fresh_stage(world)
            started = time.monotonic()
            blocks = hashes(run(stage, []))
            world.kept["on nodes"] = (blocks, time.monotonic() - started, stage.worked())
        world.kept["cluster"] = made
    return world.kept["cluster"]


class Closing:
    """Ends a cluster with its world."""

    def __init__(self, made: Cluster) -> None:
        self.made = made

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        ray.shutdown()
        self.made.shutdown()


def node_killed(seed: int, world: World) -> Shown:
    """A raylet is killed at a seeded moment of a run; another machine comes later."""
    return on_a_broken_node(seed, world, "node", signal.SIGKILL)


def node_frozen(seed: int, world: World) -> Shown:
    """A raylet is frozen at a seeded moment, given up by the cluster, and thaws when its work was done elsewhere."""
    return on_a_broken_node(seed, world, "node-frozen", signal.SIGSTOP)


def on_a_broken_node(seed: int, world: World, kind: str, strike: int) -> Shown:
    """One node of the cluster is struck while the engine works; afterwards the cluster is made whole again."""
    made = cluster(world)
    blocks, seconds, pieces = world.kept["on nodes"]
    draw = random.Random(seed)
    node = draw.choice([one for one in made.list_all_nodes() if one is not made.head_node])
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    workers = raylet.children(recursive=True)
    stage = fresh_stage(world)
    recorded = []
    struck = threading.Event()

    def act() -> None:
        raylet.send_signal(strike)
        struck.set()

    started = time.monotonic()
    try:
        with when_done(stage, draw.uniform(0.05, 0.8) * pieces, act):
            assert hashes(run(stage, recorded, SPEC)) == blocks
    finally:
        assert struck.is_set()
        extra = time.monotonic() - started - seconds
        wait_for(lambda: not alive(node), "Ray does not notice that the node is gone")
        if strike == signal.SIGSTOP:
            raylet.send_signal(signal.SIGCONT)  # what it still believes to own must do no harm
        wait_for(lambda: ended(raylet), "the raylet stays")
        for worker in workers:  # idle ones do not always notice that their raylet is gone
            if not ended(worker):
                worker.kill()
        made.remove_node(node, allow_graceful=False)
        made.add_node(num_cpus=2)
        made.wait_for_nodes()
    assert hashes(recorded) == blocks
    nothing_lost(open_store(stage.before.store), recorded)
    return Shown(
        kind=kind, seed=seed, injected=1, recovered=1, seconds=(max(0.0, extra),), worked=stage.worked(), needed=pieces
    )


def alive(node) -> bool:
    """Whether Ray believes that a node lives."""
    return any(one["NodeID"] == node.unique_id and one["Alive"] for one in ray.nodes())


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    """Waits for a condition, with a generous deadline."""
    deadline = time.monotonic() + NOTICED_WITHIN
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def wide_stage(world: World) -> Disturbed:
    """Work whose Grams together are larger than the smallest object store that Ray takes."""
    stage = make_stage(world.fresh(), "unstructured", 0.5, ffn=3072, layers=1)
    stage.solver = Solver(name="sparsegpt", rows=4096)
    return disturbed(stage, world.fresh() / "journal", {})


def object_store_full(seed: int, world: World) -> Shown:
    """Ray's object store is too small for a block, and the disk that it spills to is full; then there is room.

    Starts a Ray of its own: it needs a world in which none runs.
    """
    with SmallDisk(world.fresh() / "spill", 512 << 20) as disk:
        target = {"type": "filesystem", "params": {"directory_path": str(disk.path / "objects")}}
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=OBJECT_STORE,
            _system_config=WORKER_PROCESSES | {"object_spilling_config": json.dumps(target)},
        )
        try:
            quiet = wide_stage(world)
            started = time.monotonic()
            blocks = hashes(run(quiet, []))
            seconds = time.monotonic() - started
            stage = wide_stage(world)
            disk.leave(random.Random(seed).randrange(0, 24 << 20, 1 << 20))
            recorded = []
            started = time.monotonic()
            refused = 0
            try:
                run(stage, recorded)
            except Unavailable as error:
                clear_refusal(error, "full")
                refused = 1
            disk.make_room()
            assert hashes(run(stage, recorded)) == blocks
            extra = time.monotonic() - started - seconds
        finally:
            ray.shutdown()
    return Shown(
        kind="object-store",
        seed=seed,
        injected=1,
        recovered=1 - refused,
        resumed=refused,
        seconds=(max(0.0, extra),),
        worked=stage.worked(),
        needed=quiet.worked(),
    )
