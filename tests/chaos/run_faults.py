"""Faults of whole runs from the command line: driver, workers, ranks, Ray Train's controller; two runs of one job."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from models_for_tests import write_trained_model
from oracle import nothing_done_again, step_records, verified_versions
from small_disk import SmallDisk
from tally import Shown
from test_run import write_job
from world import World

from cluster.storage import open_store
from workflows.release import find_version

PATIENCE = 900  # seconds after which a run has hung
ROLES = {
    "shard": r"ray::ShardWorker",
    "task": r"ray::(_call|prepare|solve|assemble)",
    "rank": r"ray::(RayTrainWorker|_?TrainWorker)",
    "controller": r"ray::TrainController",
}
PAIRS = (("shard", "rank"), ("task", "controller"), ("task", "rank"), ("shard", "controller"))


def undisturbed(world: World) -> tuple[Path, str, float]:
    """The model, the digest that a run gives when nothing happens, and its seconds; made once per world."""
    if "run" not in world.kept:
        model = write_trained_model(world.fresh() / "model", layers=3)
        to = world.fresh() / "out"
        started = time.monotonic()
        code, said = finish(start(write_job(world.fresh(), model, str(to))))
        assert code == 0, said
        store = open_store(str(to))
        pointer = find_version(store, "tiny", None)
        world.kept["run"] = (model, pointer.digest, time.monotonic() - started)
    return world.kept["run"]


def start(job: Path, **environment: str) -> subprocess.Popen:
    """`karikomi run` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "run", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def run_struck(seed: int, world: World) -> Shown:
    """Two processes of one run are killed in their turn, then the driver; the same command until it gets there."""
    model, digest, seconds = undisturbed(world)
    draw = random.Random(seed)
    to = world.fresh() / "out"
    job = write_job(world.fresh(), model, str(to))
    store = open_store(str(to))
    ahead: list[Callable[[int], str]] = [striking(role, draw.uniform(0, 1)) for role in PAIRS[seed % len(PAIRS)]]
    ahead.append(after_steps(to, draw.randrange(1, 9), draw.uniform(0, 1)))
    done: list[str] = []
    first_seen: dict[str, str] = {}
    resumed = 0
    started = time.monotonic()
    while True:
        process = start(job)
        log = Reader(process)
        struck_here = 0
        while process.poll() is None:
            assert time.monotonic() - started < PATIENCE, f"hangs after {done}: {log.text}"
            if ahead and (hit := ahead[0](process.pid)):
                done.append(hit)
                ahead.pop(0)
                struck_here += 1
            time.sleep(0.02)
        code, said = process.returncode, log.end()
        now = step_records(store)
        nothing_done_again(first_seen, now)
        first_seen = now
        verified_versions(store)
        if code == 0:
            break
        assert struck_here, f"nothing was struck, and yet it ended with {code}: {said}"
        assert code == -signal.SIGKILL or (code == 75 and "error:" in said and "Traceback" not in said), said
        resumed += 1
        assert resumed < 10, "the same command does not get there"
    extra = max(0.0, time.monotonic() - started - seconds)
    versions = verified_versions(store)
    assert set(versions) == {"tiny/versions/1.json", "tiny/latest.json"}
    assert {one.digest for one in versions.values()} == {digest}
    return Shown(
        kind="run",
        seed=seed,
        injected=len(done),
        recovered=len(done) - resumed,
        resumed=resumed,
        seconds=(extra / len(done),) * len(done),
    )


def striking(role: str, wait: float) -> Callable[[int], str]:
    """Kills the first process of a role that shows up, a while after it did."""
    seen: dict[int, float] = {}

    def look(driver: int) -> str:
        for process in descendants(driver):
            try:
                if not re.match(ROLES[role], " ".join(process.cmdline())):
                    continue
                seen.setdefault(process.pid, time.monotonic())
                if time.monotonic() - seen[process.pid] >= wait:
                    process.kill()
                    return role
            except psutil.Error:
                continue
        return ""

    return look


def after_steps(to: Path, count: int, wait: float) -> Callable[[int], str]:
    """Kills the driver itself, a while after so many steps are recorded."""
    since: list[float] = []

    def look(driver: int) -> str:
        if not since and len(list(to.glob("runs/*/steps/*.json"))) >= count:
            since.append(time.monotonic())
        if since and time.monotonic() - since[0] >= wait:
            os.kill(driver, signal.SIGKILL)
            return "driver"
        return ""

    return look


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


class Reader:
    """Reads what a process says, so that it is never held up."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.text = ""
        self._process = process
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.text += line

    def end(self) -> str:
        """All of it. Ray's own processes may hold the pipe a little longer than the driver lives."""
        self._thread.join(30)
        return self.text


def two_runs(seed: int, world: World) -> Shown:
    """Two people run one job, the second a seeded while after the first: both end well, one version comes of it."""
    model, digest, seconds = undisturbed(world)
    to = world.fresh() / "out"
    job = write_job(world.fresh(), model, str(to))
    started = time.monotonic()
    first = start(job)
    readers = [Reader(first)]
    time.sleep(random.Random(seed).uniform(0, 0.7) * seconds)
    second = start(job)
    readers.append(Reader(second))
    for process, reader in zip((first, second), readers, strict=True):
        process.wait(PATIENCE)
        assert process.returncode == 0, reader.end()
    versions = verified_versions(open_store(str(to)))
    assert set(versions) == {"tiny/versions/1.json", "tiny/latest.json"}
    assert {one.digest for one in versions.values()} == {digest}
    extra = max(0.0, time.monotonic() - started - seconds)
    return Shown(kind="two-runs", seed=seed, injected=1, recovered=1, seconds=(extra,))


def run_on_a_full_disk(seed: int, world: World) -> Shown:
    """The disk of a run's destination is full after a seeded while: exit code 75, one message; then there is room."""
    model, digest, seconds = undisturbed(world)
    with SmallDisk(world.fresh() / "disk", 64 << 20) as disk:
        to = disk.path / "out"
        job = write_job(world.fresh(), model, str(to))
        disk.leave(random.Random(seed).randrange(8 << 10, 3 << 20, 4 << 10))
        started = time.monotonic()
        code, said = finish(start(job))
        refused = 0
        if code != 0:
            refused = 1
            assert code == 75, said
            assert "No space left" in said
            assert "Traceback" not in said
            before = step_records(open_store(str(to)))
            disk.make_room()
            code, said = finish(start(job))
            assert code == 0, said
            nothing_done_again(before, step_records(open_store(str(to))))
        versions = verified_versions(open_store(str(to)))
        assert {one.digest for one in versions.values()} == {digest}
        extra = max(0.0, time.monotonic() - started - seconds)
    return Shown(kind="run-disk", seed=seed, injected=refused, resumed=refused, seconds=(extra,) * refused)
