"""Wall time of pruning, ours beside the peer's: `python benchmarks/speed.py MODEL TEXT --peer PYTHON [--repeats 2]`.

SparseGPT at 50 % unstructured on the model, windows and types of quality.py. Every contender runs in a process of its
own, one after the other, and that as often as --repeats says: so all meet the same machine. Loading and saving of
the model are not counted, nor imports; those of the engine's processes are told as its start. Each run is a line of
build/speed/shown.jsonl; medians and ratios go into benchmarks/speed.md. `--profile` also says where ours spends it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anybody imports Ray
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for Ray's workers

import numpy as np
import psutil
import torch
from kept import keep
from pages import put
from peer.calling import pruned_by_peer
from profiled import seconds_by_part
from quality import CALIBRATION, stage_of, windows_of, worked_through

from cluster.layerwise import run_blocks
from cluster.session import session
from cluster.spec import ClusterSpec
from cluster.storage import open_store
from workflows.blockwork import PruneStage
from workflows.data.windows import to_parquet
from workflows.following import Shard
from workflows.models.source import load_tokenizer, resolve_source
from workflows.models.state import ModelState

SHOWN = ROOT / "build" / "speed" / "shown.jsonl"
PAGE = ROOT / "benchmarks" / "speed.md"
PATTERN, SPARSITY = "unstructured", 0.5


@dataclass(frozen=True)
class Contender:
    """Something that is timed: the plain loop, the engine with some workers of one thread, or the peer.

    Several at once say what the machine itself gives to who uses more of its cores. `alone` keeps all its processes on
    one core: else those of Ray, and the task that writes a block, are on another one.
    """

    title: str
    kind: str
    cores: int
    solver: str = "sparsegpt"
    at_once: int = 1
    alone: bool = False


CONTENDERS = {
    "peer-1": Contender("peer, 1 thread", "peer", 1),
    "loop-1": Contender("ours, plain loop, 1 thread", "loop", 1),
    "engine-1": Contender("ours, engine, 1 worker", "engine", 1),
    "engine-1-alone": Contender("ours, engine, 1 worker, all on one core", "engine", 1, alone=True),
    "peer-2": Contender("peer, 2 threads", "peer", 2),
    "loops-at-once": Contender("ours, two plain loops at once, 1 thread each", "loop", 1, at_once=2),
    "loop-2": Contender("ours, plain loop, 2 threads", "loop", 2),
    "engine-2": Contender("ours, engine, 2 workers of 1 core", "engine", 2),
    "admm-1": Contender("ours, admm, plain loop, 1 thread", "loop", 1, "admm"),
}
GOALS = (
    ("ours with 1 worker, against the peer with 1 thread", "peer-1", "engine-1", "at least 1.5 times as fast"),
    ("ours, plain loop, against the peer, 1 thread each", "peer-1", "loop-1", ""),
    ("ours, plain loop, against the peer, 2 threads each", "peer-2", "loop-2", ""),
    ("ours with 2 workers, against the peer with 2 threads", "peer-2", "engine-2", ""),
    ("ours with 2 workers, against 1 worker", "engine-1", "engine-2", "at least 1.8 times as fast"),
    ("ours with 2 workers, against 1 worker on one core", "engine-1-alone", "engine-2", ""),
    ("two plain loops at once, against one after the other: the machine's own", "loop-1", "loops-at-once", ""),
    ("our sparsegpt, against admm", "admm-1", "loop-1", "at most 1.5 times as fast"),
)


class Noted(PruneStage):
    """The real work; it notes when a worker begins with the first block."""

    def statistics(
        self, block: int, shards: Mapping[int, Shard], groups: Sequence[str], solved: Sequence[Sequence[Any]] = ()
    ) -> Iterator[np.ndarray]:
        """As in the real one."""
        if block == 0 and not solved:
            open_store(self.before.store).put(f"begun/{os.getpid()}", str(time.monotonic()).encode())
        return super().statistics(block, shards, groups, solved)


def timed_engine(stage: PruneStage, workers: int) -> dict[str, Any]:
    """Seconds of `run_blocks` on an embedded Ray that is up already; CPU seconds of all of Ray's processes.

    Its start, until the first worker begins with block 0, is part of the seconds and told alone, too.
    """
    stage = Noted(**stage.__getstate__())
    store = open_store(stage.before.store)
    moments, spent = [time.monotonic()], [0.0]

    def on_block(block: int, stored: object) -> None:
        moments.append(time.monotonic())
        if block == stage.block_count - 1:  # the workers are still there
            times = [one.cpu_times() for one in psutil.Process().children(recursive=True)]
            spent[0] = sum(one.user + one.system for one in times)

    spec = ClusterSpec(workers=workers)
    with session(spec, workers):
        moments[0] = time.monotonic()
        run_blocks(stage, spec, 1, [], on_block, lambda: False)
        seconds = time.monotonic() - moments[0]
    later = (moments[-1] - moments[1]) / (stage.block_count - 1)
    start = min(float(store.get(key)) for key in store.keys("begun/")) - moments[0]
    return {"seconds": seconds, "cpu_seconds": spent[0], "start": start, "later_block": later}


def timed_loop(stage: PruneStage) -> dict[str, Any]:
    """Seconds of the plain loop, in this process."""
    began = time.process_time()
    _, seconds = worked_through(stage)
    return {"seconds": seconds, "cpu_seconds": time.process_time() - began}


def one(name: str, model: str, text: Path, peer: str, profile: bool) -> dict[str, Any]:
    """One contender, once, in this process."""
    contender = CONTENDERS[name]
    torch.set_num_threads(1 if contender.kind == "engine" else contender.cores)
    with tempfile.TemporaryDirectory() as temporary:
        source = resolve_source(model, Path(temporary))
        windows = windows_of(text.read_text(), load_tokenizer(source), 0, CALIBRATION)
        dense = ModelState(
            source=source.uri, source_digest=source.digest, config=source.config, store=f"{temporary}/store"
        )
        if contender.kind == "peer":
            return pruned_by_peer(peer, dense, windows, "sparsegpt", PATTERN, SPARSITY, Path(temporary) / "peer")[1]
        stored = open_store(dense.store).put("windows", to_parquet({"calibration": windows}))
        stage = stage_of(dense, stored, {"name": contender.solver}, PATTERN, SPARSITY)
        if contender.alone:
            psutil.Process().cpu_affinity([0])  # what it starts inherits it
        if contender.kind == "engine":
            return timed_engine(stage, contender.cores)
        if profile:
            return seconds_by_part(stage, timed_loop)
        return timed_loop(stage)


def in_own_process(name: str, asked: argparse.Namespace, *words: str) -> None:
    """One contender in a process of its own, or as many at once as it asks for; the slowest one's result is kept."""
    load = os.getloadavg()[0]
    command = [sys.executable, __file__, asked.model, asked.text, "--peer", asked.peer, "--one", name, *words]
    running = [
        subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(CONTENDERS[name].at_once)
    ]
    found = []
    for process in running:
        output, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{name} ended with {process.returncode}: {errors[-3000:]}")
        found.append(json.loads(output.splitlines()[-1]))
    slowest = max(found, key=lambda each: each["seconds"])
    keep(SHOWN, {"name": name, "load": round(load, 1), **slowest})


def page() -> str:
    """Medians, ratios, and where the time goes."""
    shown = [json.loads(line) for line in SHOWN.read_text().splitlines()]
    runs = {name: [one for one in shown if one["name"] == name and "parts" not in one] for name in CONTENDERS}
    medians = {name: statistics.median(one["seconds"] for one in those) for name, those in runs.items() if those}
    works = {
        name: statistics.median(one["seconds"] - one.get("start", 0) for one in those)
        for name, those in runs.items()
        if those
    }
    lines = ["| | runs | s, median | of it start | least | most | CPU s, median | load before |", f"|---|{'---|' * 7}"]
    for name in medians:
        seconds = [one["seconds"] for one in runs[name]]
        cpu = statistics.median(one["cpu_seconds"] for one in runs[name])
        load = statistics.median(one["load"] for one in runs[name])
        lines.append(
            f"| {CONTENDERS[name].title} | {len(seconds)} | {medians[name]:.0f} | {medians[name] - works[name]:.0f} | "
            f"{min(seconds):.0f} | {max(seconds):.0f} | {cpu:.0f} | {load:.1f} |"
        )
    lines += ["", "| | times as fast | with the start | goal |", "|---|---|---|---|"]
    for title, slow, fast, goal in GOALS:
        if slow in medians and fast in medians:
            done = CONTENDERS[fast].at_once  # times as much as the other
            ratio, with_start = works[slow] / works[fast] * done, medians[slow] / medians[fast] * done
            lines.append(f"| {title} | {ratio:.2f} | {with_start:.2f} | {goal} |")
    for profile in [one for one in shown if "parts" in one][-1:]:
        lines += [
            "",
            f"Where the time goes – {CONTENDERS[profile['name']].title}:",
            "",
            "| | CPU s | share |",
            "|---|---|---|",
        ]
        for part, seconds in profile["parts"].items():
            lines.append(f"| {part} | {seconds:.1f} | {seconds / profile['cpu_seconds']:.0%} |")
    peers = [one["versions"] for one in shown if "versions" in one]
    told = ", ".join(f"{name} {number}" for name, number in peers[-1].items()) if peers else "not measured"
    ours = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "ray"))
    machine = f"{os.cpu_count()} cores ({torch.backends.cpu.get_cpu_capability()})"
    return "\n".join([*lines, "", f"Machine: {machine}. Ours: {ours}. The peer: {told}. As of {date.today()}."])


def main() -> None:
    """Rounds of all contenders, then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="interpreter of the peer's environment")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--one", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(asked.one, asked.model, asked.text, asked.peer, asked.profile)))
        return
    for _ in range(asked.repeats):
        for name in asked.only:
            in_own_process(name, asked)
    if asked.profile:
        in_own_process("loop-1", asked, "--profile")
    put(PAGE, page())


if __name__ == "__main__":
    main()
