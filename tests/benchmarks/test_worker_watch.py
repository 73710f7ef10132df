"""The watch over workers' memory: what it counts, and who it takes for what."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from worker_watch import Look, WorkerWatch, peaks, private_memory, role_of

MIB = 1 << 20
WORKER = """
import mmap, sys, threading
from ray._raylet import setproctitle
setproctitle(sys.argv[1])
shared = mmap.mmap(-1, 64 << 20)
shared.write(b"x" * len(shared))
private = bytearray(b"x" * (128 << 20))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("title", "role"),
    [("ray::ShardWorker.statistics", "ShardWorker"), ("ray::solve", "solve"), ("ray::IDLE", "idle"), ("raylet", None)],
)
def test_private_memory_is_seen_without_shared_pages_and_by_role(title, role):
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, title], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        watch = WorkerWatch(os.getpid())
        try:
            assert one.stdout.readline() == "ready\n"
            assert role_of(one.pid) == role
            private, shared = private_memory(one.pid)
            assert 128 * MIB < private < 400 * MIB
            assert shared > 64 * MIB
            watch.start()
            deadline = time.monotonic() + 60
            while role is not None and role not in watch.roles:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            looks = watch.stop() if watch.is_alive() else []
            one.stdin.close()
    seen = {look.role for look in looks if look.process == one.pid}
    assert seen == ({role} if role else set())


def test_a_peak_is_the_largest_of_a_role_above_the_baseline():
    looks = [Look(0, 1, "solve", 500, 0), Look(1, 2, "solve", 700, 9), Look(1, 2, "idle", 300, 9)]
    assert peaks(looks, 200) == {"solve": 500, "idle": 100}
