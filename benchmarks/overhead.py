"""What submission costs: the same tiny job, attached to a local cluster and by `submit --wait`, in turn.

    python benchmarks/overhead.py [--rounds 3]

Starts the cluster itself (a head and one node on loopback). One run of each kind goes before, unmeasured: the
first to come also starts Ray's worker processes. The overhead is the whole of `karikomi submit JOB --wait`, from the
start of its process to its end, less what the same work takes in a process that is attached to the same cluster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT, ROOT / "tests"]
os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anybody imports Ray
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])
sys.path[:0] = map(str, FOLDERS)

from jobs_for_tests import tiny_job

DEMO = 565.0  # seconds that the demo's run takes, see demo.md
BOOKKEEPING = ("_open_account", "_beat", "ended")  # methods of AttemptLog that write


def attached(path: Path) -> None:
    """In a process of its own: carries a job out, and prints how long its bookkeeping kept it."""
    from jobs import running
    from jobs.job import read_job

    main, spent = threading.current_thread(), [0.0]

    def timed(method):
        def call(self, *arguments, **named):
            began = time.monotonic()
            try:
                return method(self, *arguments, **named)
            finally:
                if threading.current_thread() is main:  # heartbeats in between are written beside the work
                    spent[0] += time.monotonic() - began

        return call

    for name in BOOKKEEPING:
        setattr(running.AttemptLog, name, timed(getattr(running.AttemptLog, name)))
    running.carry_out(read_job(path), lambda event: None, lambda: False)
    print(json.dumps(spent[0]))


def seconds_of(to: Path) -> tuple[float, float, float]:
    """When a run's only attempt was claimed, began to work and ended, by its own records; as Unix time."""
    (attempt,) = to.glob("runs/*/attempts/1")
    texts = [
        json.loads((attempt / f"{name}.json").read_text())[field]
        for name, field in (("started", "at"), ("measures", "began"), ("ended", "at"))
    ]
    claimed, began, ended = (datetime.fromisoformat(text).timestamp() for text in texts)
    return claimed, began, ended


@contextmanager
def watching_for_driver(cluster, attempt: str):
    """A list that holds the moment at which the attempt's driver was first seen, to a tenth of a second."""
    seen: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            if cluster.driver_pid(attempt) is not None:
                seen.append(time.time())
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def call(*words: object) -> str:
    """A command's output; an error when it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words} ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


def run_attached(directory: Path, model: Path, cluster) -> dict[str, float]:
    """One run in a process that is attached to the cluster."""
    to, path = directory / "store", directory / "job.yaml"
    path.write_text(json.dumps(tiny_job(model, to, cluster={"workers": 1, "address": f"127.0.0.1:{cluster.port}"})))
    began = time.time()
    bookkeeping = json.loads(call(__file__, "--attached", path).splitlines()[-1])
    whole = time.time() - began
    _, first, last = seconds_of(to)
    return {"whole": whole, "the run": last - first, "bookkeeping": bookkeeping}


def run_submitted(directory: Path, model: Path, cluster) -> dict[str, float]:
    """One run by `karikomi submit --wait`, and where its time went."""
    from cluster.ray_jobs import RayJobs
    from jobs.job import parse_job

    to, path = directory / "store", directory / "job.yaml"
    path.write_text(json.dumps(tiny_job(model, to, cluster={"workers": 1, "address": cluster.url})))
    attempt = f"{parse_job(path.read_text(), str(path)).run}-a1"
    began = time.time()
    with watching_for_driver(cluster, attempt) as seen:
        call("-m", "jobs.cli", "submit", path, "--cluster", cluster.url, "--wait")
        ended = time.time()
    claimed, first, last = seconds_of(to)
    told = RayJobs(cluster.url)._get(f"/api/jobs/{attempt}")
    taken, over = told["start_time"] / 1000, told["end_time"] / 1000
    return {
        "whole": ended - began,
        "command: imports, check, plan": claimed - began,
        "package: made, sent": taken - claimed,
        "Ray: places the driver, unpacks the package": seen[0] - taken,
        "driver: imports, reads its job": first - seen[0],
        "the run": last - first,
        "driver: from its record to its end": over - last,
        "command: notices the end, ends": ended - over,
    }


def main() -> None:
    """Both kinds in turn, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attached", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.attached:
        attached(arguments.attached)
        return
    from clusters_for_tests import NodeOf, RayCluster
    from models_for_tests import write_tiny_model

    kinds = {"attached": run_attached, "submitted": run_submitted}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as temporary, RayCluster(NodeOf(cpus=4), head=NodeOf(cpus=1)) as cluster:
        os.environ.update(cluster.client_environment())
        model = write_tiny_model(Path(temporary) / "model")
        for turn in range(arguments.rounds + 1):
            for name, run in kinds.items():
                directory = Path(temporary) / f"{name}-{turn}"
                directory.mkdir()
                row = run(directory, model, cluster)
                print(f"{'unmeasured' if turn == 0 else turn} {name}: {row['whole']:.1f} s", flush=True)
                rows[name] += [row] if turn else []
    for name, those in rows.items():
        print(f"\n| {name} | median s | least | most |\n|---|---|---|---|")
        for part in those[0]:
            values = [one[part] for one in those]
            print(f"| {part} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    pairs = list(zip(rows["submitted"], rows["attached"], strict=True))
    outside = statistics.median(one["whole"] - other["the run"] for one, other in pairs)
    command = statistics.median(one["whole"] - other["whole"] for one, other in pairs)
    print(f"\nsubmit to finish, less the work itself: {outside:.1f} s, {outside / DEMO:.1%} of the demo's {DEMO:.0f} s")
    print(f"submit to finish, less the attached process from start to end: {command:.1f} s")
    print(f"load of the machine: {', '.join(f'{one:.1f}' for one in os.getloadavg())} (1, 5, 15 minutes)")


if __name__ == "__main__":
    main()
