"""Efficiency of the layer-wise engine on 1, 2 and 4 workers: `python benchmarks/scaling.py [--blocks 5]`.

Every worker is a node of its own (a raylet on this machine, one CPU, one thread). The same work in a plain loop without
Ray gives the pure computing time and the rates that `scaling_model.py` is fed with; its prediction stands beside what
was measured. Bytes are Ray's own count of what was written into each node's object store. Block 0 warms up and does
not count for seconds. Writes scaling.md.
"""

import argparse
import json
import operator
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT, ROOT / "benchmarks"]
os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anybody imports Ray
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = map(str, FOLDERS)

import psutil
from big_checkpoint import LLAMA_3_8B, write_checkpoint
from pages import put
from scaling_model import LLAMA_8B, Machine, Schedule, Shape, least_traffic, predict, traffic

PAGE = ROOT / "benchmarks" / "scaling.md"
WORKERS = (1, 2, 4)
STORE = 700 << 20  # bytes of each node's object store


def config_of(shape: Shape) -> dict:
    """A config of this shape; heads of 64 numbers."""
    return LLAMA_3_8B | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": shape.key_value // 64,
        "vocab_size": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def stage_for(directory: Path, schedule: Schedule):
    """The work on the model in `directory`/model, with windows of random tokens."""
    from random_stage import random_stage

    windows = (schedule.windows, schedule.length)
    return random_stage(directory, windows, schedule.shards, "2:4", "float32", rows=schedule.rows)


class Timed:
    """A stage whose steps are timed: processor seconds of each, summed over the blocks but the first.

    A forward pass through each block, the block's reading and one addition of every Gram are done and timed besides, to
    know them from what they are part of. Solves stand apart by the width of what they solve, to tell their products
    from their calls.
    """

    def __init__(self, stage):
        self.stage = stage
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str):
        return getattr(self.stage, name)

    def _timed(self, step: str, work, *arguments):
        began = time.process_time()
        done = work(*arguments)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.process_time() - began
        return done

    def statistics(self, block, shards, groups, solved):
        """Of a block's first turn also what is timed besides."""
        from workflows.observing import move_on

        if not solved:
            module = self._timed("read", self.stage._decoder.block, block)
            windows = [hidden for shard in shards.values() for hidden in shard.hidden]
            self._timed("forward", move_on, self.stage._decoder, block, module, windows)
        sums = self.stage.statistics(block, shards, groups, solved)
        while (one := self._timed("statistics", next, sums, None)) is not None:
            yield one

    def prepare(self, group, total):
        """As in the stage; one addition besides."""
        self._timed("add", operator.add, total, total)
        return self._timed(f"prepare {len(total)}", self.stage.prepare, group, total)

    def solve(self, block, unit, prepared):
        """As in the stage."""
        return self._timed(f"solve {prepared[0].shape[-1]}", self.stage.solve, block, unit, prepared)

    def assemble(self, block, refined, results):
        """As in the stage."""
        return self._timed("assemble", self.stage.assemble, block, refined, results)

    def advance(self, block, finished, last, shards):
        """As in the stage."""
        self._timed("advance", self.stage.advance, block, finished, last, shards)


def plain(directory: Path, schedule: Schedule) -> dict:
    """The same work without Ray: processor and wall seconds of every step, summed over the blocks but the first."""
    from cluster.alone import blocks_alone

    stage = Timed(stage_for(directory, schedule))
    blocks = blocks_alone(stage)
    next(blocks)
    stage.seconds.clear()
    started = time.monotonic()
    later = len(list(blocks))
    return {"seconds": stage.seconds, "wall": time.monotonic() - started, "blocks": later}


def engine(directory: Path, schedule: Schedule) -> dict:
    """The engine on as many simulated nodes: wall and processor seconds, and bytes written into object stores."""
    import ray
    from ray.cluster_utils import Cluster

    from cluster.layerwise import run_blocks
    from cluster.session import WORKER_PROCESSES, worker_environment
    from cluster.spec import ClusterSpec

    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)
    stage = stage_for(directory, schedule)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE, "_system_config": WORKER_PROCESSES},
    )
    looks = []
    try:
        for _ in range(schedule.workers):
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        cluster.wait_for_nodes()
        ray.init(cluster.address, runtime_env=worker_environment(), log_to_driver=False, logging_level="ERROR")
        bytes_before = written()
        run_blocks(
            stage, ClusterSpec(workers=schedule.workers), 1, [],
            lambda block, stored: looks.append((time.monotonic(), processor_seconds())), lambda: False,
        )  # fmt: skip
        bytes_per_block = (written() - bytes_before) / stage.block_count
        link, store, task = transfers(schedule.workers)
    finally:
        ray.shutdown()
        cluster.shutdown()
    (begun, used_before), (ended, used_after) = looks[0], looks[-1]
    return {
        "wall": ended - begun,
        **{
            who: sum(one - used_before.get(key, 0.0) for key, one in used_after.items() if key[1] == who)
            for who in ("workers", "ray")
        },
        "bytes_per_block": bytes_per_block,
        "blocks": stage.block_count - 1,
        "link": link,
        "store": store,
        "task": task,
    }


def processor_seconds() -> dict[tuple[int, str], float]:
    """Processor seconds so far of this process and all below it, by number and by who it is: a worker, or Ray's own."""
    found = {}
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):
            title = " ".join(process.cmdline()).strip()
            worker = title.startswith("ray::") and not title.endswith("Agent")
            times = process.cpu_times()
            found[process.pid, "workers" if worker else "ray"] = times.user + times.system
    return found


def written() -> int:
    """Bytes ever written into the object stores of all nodes, copies that came from other nodes included."""
    import ray
    from ray._private.internal_api import node_stats

    nodes = [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]]
    return sum(node_stats(*node, include_memory_info=False).store_stats.cumulative_created_bytes for node in nodes)


def transfers(workers: int) -> tuple[float, float, float]:
    """Bytes per second from one node to another and into a store, and the seconds of a task that does nothing."""
    import numpy as np
    import ray

    @ray.remote(num_cpus=1)
    def make(size: int):
        return np.ones(size, dtype=np.uint8)

    @ray.remote(num_cpus=1)
    def nothing() -> None:
        return None

    def seconds(work) -> float:
        began = time.monotonic()
        work()
        return time.monotonic() - began

    size = 100 << 20
    ray.get([nothing.remote() for _ in range(2 * workers)])
    there = [make.remote(size) for _ in range(3)]
    ray.wait(there, num_returns=3, fetch_local=False)
    link = [size / seconds(lambda one=one: ray.get(one)) for one in there]  # to the head, where the driver is
    array = np.ones(size, dtype=np.uint8)
    store = [size / seconds(lambda: ray.put(array)) for _ in range(3)]
    tasks = seconds(lambda: ray.get([nothing.remote() for _ in range(100)])) / 100
    return sorted(link)[1], sorted(store)[1], tasks


def machine_from(shape: Shape, schedule: Schedule, found: dict, transfer: dict) -> Machine:
    """This machine's rates, from the plain loop's processor seconds and the transfers."""
    seconds = {name: value / found["blocks"] for name, value in found["seconds"].items()}
    widths = sorted(set(shape.widths.values()))
    attention = 4 * schedule.length * schedule.tokens * shape.hidden
    forward = 2 * shape.weights * schedule.tokens + attention
    grams = 2 * sum(width**2 for width in shape.widths.values()) * schedule.tokens
    factors = sum(width**3 / 3 for width in shape.widths.values())
    units = schedule.units(shape)
    first, second = (sum(rows * c**2 for rows, c in units if c == width) for width in widths)
    one, other = (sum(c for _, c in units if c == width) for width in widths)
    a, b = seconds[f"solve {widths[0]}"], seconds[f"solve {widths[1]}"]
    per_operation = max(0.0, (a * other - b * one) / (first * other - second * one))  # two equations, two unknowns
    column = (a - per_operation * first) / one
    preparing = sum(value for name, value in seconds.items() if name.startswith("prepare"))
    return Machine(
        name="this machine, one thread",
        forward=forward / seconds["forward"],
        gram=grams / max(1e-9, seconds["statistics"] + seconds["advance"] - seconds["read"] - seconds["forward"]),
        factor=factors / preparing,
        solve=1 / per_operation if per_operation else float("inf"),
        column=column,
        copy=float("inf"),
        add=shape.gram_bytes / seconds["add"],
        add_here=shape.gram_bytes / seconds["add"],
        store=transfer["store"],
        link=transfer["link"],
        read=shape.block_bytes / seconds["read"],
        write_one=shape.block_bytes / max(1e-9, seconds["assemble"] - seconds["read"]),
        task=transfer["task"],
        cores=os.cpu_count(),
    )


def pages(shape: Shape, schedule: Schedule, found: dict, runs: dict[int, dict], load: float) -> str:
    """Both tables and the rates."""
    import ray
    import torch

    blocks = found["blocks"]
    pure = sum(seconds for name, seconds in found["seconds"].items() if name not in ("read", "forward", "add")) / blocks
    machine = machine_from(shape, schedule, found, runs[2 if 2 in runs else 1])
    alone = runs[1]["wall"] / blocks
    lines = [
        f"Machine: {os.cpu_count()} CPU cores; load {load:.1f} when it began, {os.getloadavg()[0]:.1f} when it ended."
        f" {date.today()}; torch {torch.__version__}, ray {ray.__version__}.",
        f"Model: {shape.blocks} Llama blocks of width {shape.hidden}, FFN {shape.ffn}, {shape.key_value} for keys and"
        f" values ({shape.weights / 1e6:.1f} M weights each); {schedule.windows} windows of {schedule.length} tokens in"
        f" {schedule.shards} shards; sparsegpt 2:4, float32.",
        f"Pure computing in a plain loop: {pure:.2f} processor seconds per block.",
        "",
        "| workers | s per block | efficiency | of the cores there are | processor s per block: workers | Ray's own"
        " | all, beyond the plain loop | predicted s | predicted / measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for workers, run in runs.items():
        wall, own, rays = (run[name] / blocks for name in ("wall", "workers", "ray"))
        cores, more = min(workers, os.cpu_count() or 1), own + rays - pure
        said = predict(shape, machine, replace_workers(schedule, workers)).block
        lines.append(
            f"| {workers} | {wall:.2f} | {alone / (workers * wall):.0%} | {alone / (cores * wall):.0%} | {own:.2f} |"
            f" {rays:.2f} | {more:+.2f} s, {more / pure:+.0%} | {said:.2f} | {said / wall:.2f} |"
        )
    lines += [
        "",
        "| workers = nodes | written per block, MB | least possible, MB | ratio | counted out by the simulation, MB |",
        "|---|---|---|---|---|",
    ]
    for workers, run in runs.items():
        given = replace_workers(schedule, workers)
        least = least_traffic(shape, given, workers)
        said, measured = traffic(shape, given, workers).all, run["bytes_per_block"]
        lines.append(
            f"| {workers} | {measured / 1e6:.1f} | {least / 1e6:.1f} | {measured / least:.2f} | {said / 1e6:.1f} |"
        )
    lines += [
        "",
        f"Rates of one thread here, from the plain loop: forward {machine.forward / 1e9:.0f} GFLOP/s, Grams"
        f" {machine.gram / 1e9:.0f}, Cholesky {machine.factor / 1e9:.0f}, solver's products"
        f" {machine.solve / 1e9:.0f}, {machine.column * 1e6:.0f} µs per column of a unit; adding Grams"
        f" {machine.add / 1e9:.1f} GB/s; from one node to another {machine.link / 1e9:.2f} GB/s, into a store"
        f" {machine.store / 1e9:.2f} GB/s; {machine.task * 1e3:.1f} ms per task.",
    ]
    one_node = replace(machine, per_node=2, link=float("inf"))
    large = predict(LLAMA_8B, one_node, Schedule(windows=4, length=256, shards=2, rows=512, workers=2))
    lines += [
        "",
        "With the same rates, a block of an 8B model as in `memory_8b.md` (another shape, one node, two workers) is"
        f" predicted to take {large.block:.0f} s, {large.saturated[0][1]:.0%} of it to {large.saturated[0][0]}.",
    ]
    return "\n".join(lines)


def replace_workers(schedule: Schedule, workers: int) -> Schedule:
    """The same schedule on another number of workers."""
    return replace(schedule, workers=workers)


def main() -> None:
    """The plain loop, then the engine on each number of workers, each in a process of its own; then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--here", nargs=2, metavar=("DIRECTORY", "WORKERS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    shape = Shape("small", asked.blocks, hidden=1024, ffn=2816, key_value=512)
    schedule = Schedule(windows=asked.windows, length=256, shards=4, rows=512, workers=1)
    if asked.here:
        directory, workers = Path(asked.here[0]), int(asked.here[1])
        given = replace_workers(schedule, workers)
        print(json.dumps(engine(directory, given) if workers else plain(directory, given)), flush=True)
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        write_checkpoint(Path(temporary) / "model", config_of(shape))

        def measured(workers: int) -> dict:
            words = ["--blocks", str(asked.blocks), "--windows", str(asked.windows)]
            done = subprocess.run(
                [sys.executable, __file__, *words, "--here", temporary, str(workers)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS)), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{workers or 'plain'}: {found}", flush=True)
            return found

        found = measured(0)
        runs = {workers: measured(workers) for workers in WORKERS}
    text = pages(shape, schedule, found, runs, load)
    print(text)
    put(PAGE, text)


if __name__ == "__main__":
    main()
