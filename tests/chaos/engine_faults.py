"""Faults of the layer-wise engine on a real Ray: killed workers and drivers, a broken network, a full disk."""

import os
import random
import signal
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from disturbed import Disturbed, chosen, disturbed, journal_of, start_driver, when_done
from faulty_proxy import Mix
from oracle import clear_refusal, nothing_done_again, nothing_lost, step_records
from small_disk import SmallDisk
from store_faults import TOGETHER
from tally import Shown
from test_blockwork import make_stage
from world import World

from cluster.errors import Unavailable
from cluster.layerwise import run_blocks
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import Stored, open_store

SPEC = ClusterSpec(workers=2, wait_seconds=120)
AT_WORK = tuple(f"ray::{name}" for name in ("ShardWorker", "prepare", "solve", "assemble", "_call"))
PATIENCE = 600  # seconds after which what should have ended has hung


@dataclass(frozen=True)
class Undisturbed:
    """What the same work gives, and costs, when nothing happens."""

    blocks: list[str]
    seconds: float
    journal: Path

    @property
    def pieces(self) -> int:
        return len(self.journal.read_text().splitlines())


def undisturbed(world: World) -> Undisturbed:
    """Made once per world; starts the Ray that the cases share. The first run warms up, the second one counts."""
    if "undisturbed" not in world.kept:
        os.environ.update(world.s3_environment)  # before Ray: its workers reach the server by the proxy
        world.enter(session(ClusterSpec(), cpus=4))
        for _ in range(2):
            stage = disturbed(make_stage(world.fresh(), "unstructured", 0.5), world.fresh() / "journal", {})
            started = time.monotonic()
            blocks = hashes(run(stage, []))
            seconds = time.monotonic() - started
        world.kept["undisturbed"] = Undisturbed(blocks, seconds, Path(stage.journal))
    return world.kept["undisturbed"]


def hashes(blocks: list[Stored]) -> list[str]:
    return [one.sha256 for one in blocks]


def fresh_stage(world: World, strikes: dict[str, int] | None = None, store: str = "") -> Disturbed:
    """The same work in a place of its own, which may be another store."""
    stage = disturbed(make_stage(world.fresh(), "unstructured", 0.5), world.fresh() / "journal", strikes or {})
    if store:
        windows = open_store(stage.before.store).get(stage.windows_key)
        open_store(store).put(stage.windows_key, windows)
        stage.before = stage.before.model_copy(update={"store": store})
    return stage


def run(stage: Disturbed, recorded: list[Stored], spec: ClusterSpec = SPEC) -> list[Stored]:
    """One attempt, going on after what is recorded; records what it finishes."""
    return run_blocks(stage, spec, 1, list(recorded), lambda block, stored: recorded.append(stored), lambda: False)


def run_until_done(stage: Disturbed, after_refusal=lambda: None, spec: ClusterSpec = SPEC) -> tuple[list[Stored], int]:
    """The same call until it gets there: the blocks, and how many attempts refused.

    Whatever was recorded stays as it is and is not done again; the caller is told of every refusal.
    """
    recorded: list[Stored] = []
    refused = 0
    while True:
        before = list(recorded)
        try:
            blocks = run(stage, recorded, spec)
        except Unavailable as error:
            clear_refusal(error)
            refused += 1
            assert refused < 10, "the same command does not get there"
            after_refusal()
        else:
            assert blocks == recorded
            return blocks, refused
        finally:
            assert recorded[: len(before)] == before
            nothing_lost(open_store(stage.before.store), recorded)


def shown(kind: str, seed: int, stage: Disturbed, faults: int, resumed: int, extra: float, world: World) -> Shown:
    """The tally of a run that got there; `extra` seconds beyond an undisturbed one."""
    return Shown(
        kind=kind,
        seed=seed,
        injected=faults,
        recovered=faults - resumed,
        resumed=resumed,
        seconds=(max(0.0, extra) / faults,) * faults if faults else (),
        worked=stage.worked(),
        needed=undisturbed(world).pieces,
    )


def worker_struck(seed: int, world: World) -> Shown:
    """Three workers or tasks of one run are killed in the middle of pieces of work that the seed chose."""
    expected = undisturbed(world)
    stage = fresh_stage(world, chosen(seed, 3, expected.journal))
    started = time.monotonic()
    blocks, refused = run_until_done(stage)
    extra = time.monotonic() - started - expected.seconds
    assert hashes(blocks) == expected.blocks
    return shown("worker", seed, stage, len(stage.struck()), refused, extra, world)


def worker_shot(seed: int, world: World) -> Shown:
    """Up to three of Ray's processes at work, whichever they are, are killed from outside at random times."""
    expected = undisturbed(world)
    stage = fresh_stage(world)
    draw = random.Random(seed)
    shot: list[str] = []

    def shoot() -> None:
        if busy := busy_workers(os.getpid()):
            victim, name = draw.choice(busy)
            victim.kill()
            shot.append(name)

    started = time.monotonic()
    with ExitStack() as shooters:
        for _ in range(3):
            shooters.enter_context(when_done(stage, draw.uniform(0, 0.95) * expected.pieces, shoot))
        blocks, refused = run_until_done(stage)
    extra = time.monotonic() - started - expected.seconds
    assert hashes(blocks) == expected.blocks
    return shown("worker-outside", seed, stage, len(shot), refused, extra, world)


def busy_workers(root: int) -> list[tuple[psutil.Process, str]]:
    """Ray's worker processes below a process that have something to do, with what they call themselves."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if name.startswith(AT_WORK):  # not the raylet's own agents, whose end is the raylet's end
            found.append((process, name))
    return sorted(found, key=lambda one: one[0].pid)


def ended(process: psutil.Process) -> bool:
    """Whether a process is over; nobody may have asked how it ended."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def worker_frozen(seed: int, world: World) -> Shown:
    """A process freezes within a piece of work; nothing in Ray notices that, so the engine's own time limit does.

    It thaws when others have done its work: what it still writes then must do no harm.
    """
    expected = undisturbed(world)
    stage = fresh_stage(world, chosen(seed, 1, expected.journal, signal.SIGSTOP))
    started = time.monotonic()
    limit = SPEC.model_copy(update={"block_seconds": max(30.0, 2 * expected.seconds)})
    try:
        blocks, refused = run_until_done(stage, spec=limit)
    finally:
        for victim in map(psutil.Process, filter(psutil.pid_exists, stage.struck())):
            victim.resume()
    extra = time.monotonic() - started - expected.seconds
    assert hashes(blocks) == expected.blocks
    nothing_lost(open_store(stage.before.store), blocks)
    return shown("worker-frozen", seed, stage, len(stage.struck()), refused, extra, world)


def driver_killed(seed: int, world: World) -> Shown:
    """The driver is killed twice at random times; the third one finishes."""
    expected = undisturbed(world)
    stage = fresh_stage(world)
    draw = random.Random(seed)
    address = ray.get_runtime_context().gcs_address
    store = open_store(stage.before.store)
    first_seen: dict[str, str] = {}
    kills = 0
    seconds = 0.0
    for number in range(3):
        started = time.monotonic()
        driver = start_driver(stage, address)
        assert driver.stdout.readline() == "begun\n", driver.stderr.read()
        begun = time.monotonic()
        if number < 2:
            with when_done(stage, draw.uniform(number / 2, number / 2 + 0.45) * expected.pieces, driver.kill):
                driver.communicate(timeout=PATIENCE)
            kills += driver.returncode == -signal.SIGKILL
        else:
            said, errors = driver.communicate(timeout=PATIENCE)
            assert driver.returncode == 0, errors
            assert said.split() == expected.blocks
            seconds = begun - started
        now = step_records(store)
        nothing_done_again(first_seen, now)
        first_seen = now
        nothing_lost(store, journal_of(stage).finished_blocks())
    return shown("driver", seed, stage, kills, kills, seconds * kills, world)


def two_drivers(seed: int, world: World) -> Shown:
    """Two drivers work on one run: both from its start (even seeds), or the second a seeded while later."""
    expected = undisturbed(world)
    stage = fresh_stage(world)
    address = ray.get_runtime_context().gcs_address
    drivers = [start_driver(stage, address)]
    second = threading.Event()
    late = random.Random(seed).uniform(0, 0.4) if seed % 2 else 0  # a process takes long to start beside a quick run
    with when_done(stage, late * expected.pieces, second.set):
        assert second.wait(PATIENCE)
        drivers.append(start_driver(stage, address))
    for driver in drivers:
        said, errors = driver.communicate(timeout=PATIENCE)
        assert driver.returncode == 0, errors
        assert said.split()[1:] == expected.blocks
    nothing_lost(open_store(stage.before.store), journal_of(stage).finished_blocks())
    return shown("two-drivers", seed, stage, 1, 0, 0, world)


def engine_network(seed: int, world: World) -> Shown:
    """A whole run with its store behind a network that breaks in every way at once."""
    expected = undisturbed(world)
    stage = fresh_stage(world, store=world.s3_store().uri)
    mix = Mix(seed, {kind: rate * (1 + seed % 3) / 2 for kind, rate in TOGETHER.items()})
    first_request = len(world.proxy.requests)
    started = time.monotonic()
    with world.broken_network(mix):
        blocks, refused = run_until_done(stage)
    extra = time.monotonic() - started - expected.seconds
    assert hashes(blocks) == expected.blocks
    nothing_lost(open_store(stage.before.store), blocks)
    done = shown("engine-network", seed, stage, mix.done.total(), refused, extra, world)
    return done.model_copy(update={"requests": len(world.proxy.requests) - first_request})


def engine_disk_full(seed: int, world: World) -> Shown:
    """The disk of a run's store fills up after a seeded number of blocks; then the operator makes room."""
    expected = undisturbed(world)
    with SmallDisk(world.fresh() / "disk", 16 << 20) as disk:
        stage = fresh_stage(world, store=str(disk.path / "store"))
        disk.leave(random.Random(seed).randrange(0, 3 * BLOCK, 4096))
        started = time.monotonic()
        blocks, refused = run_until_done(stage, disk.make_room)
        extra = time.monotonic() - started - expected.seconds
        assert hashes(blocks) == expected.blocks
        assert refused == 1, "the disk was not full"
        return shown("engine-disk", seed, stage, 1, 1, extra, world)


BLOCK = 120_000  # bytes of a block file, about
