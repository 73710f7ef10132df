"""An 8-billion-parameter model is pruned on a small machine: `python benchmarks/memory_8b.py DIRECTORY [--blocks 3]`.

Makes a random Llama-3-8B (16 GB) in DIRECTORY/model where there is none, prunes its first blocks by SparseGPT with two
workers, kills the driver once in the middle, goes on from the recorded blocks, and watches the private memory of every
worker process. Fails when one goes over 3 GiB above an idle worker, or when the checkpoint is not whole afterwards.
What was done is in DIRECTORY/events.jsonl; cut off anywhere, the same command goes on. Writes memory_8b.md and .svg.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = [ROOT, ROOT / "benchmarks"]
os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anybody imports Ray
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION", "0.4")  # of free memory; Ray's own default is 0.3
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])
sys.path[:0] = map(str, FOLDERS)

import psutil
from big_checkpoint import LLAMA_3_8B, write_checkpoint
from pages import put
from worker_watch import Look, WorkerWatch, peaks, private_memory

GIB = 1 << 30
LIMIT = 3 * GIB
PATIENCE = 60  # seconds for a killed driver's processes to go
PAGE, PLOT = ROOT / "benchmarks" / "memory_8b.md", ROOT / "benchmarks" / "memory_8b.svg"
ROLES = {"ShardWorker": "shard worker", "prepare": "prepare", "solve": "solve", "assemble": "assemble", "idle": "idle"}


class Events:
    """What was done so far, one JSON line each; survives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, what: str, **values) -> None:
        """Keeps one event."""
        line = json.dumps({"what": what, "at": time.time(), **values})
        with self.path.open("a") as file:
            file.write(f"{line}\n")
        print(line if len(line) < 300 else f"{line[:300]}…", flush=True)

    def of(self, what: str) -> list[dict]:
        """All events of a kind, in order."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [one for one in map(json.loads, lines) if one["what"] == what]


def stage_for(directory: Path, asked: argparse.Namespace):
    """The work on the model, with windows of random tokens; returns it and where its blocks are recorded."""
    from random_stage import random_stage

    from cluster.storage import open_store
    from workflows.steps import Journal, Work

    journal = Journal(open_store(str(directory / "store")), "memory", lambda event: None)
    work = Work(journal, "prune", 1, "0" * 64)
    windows = (asked.windows, asked.length)
    return random_stage(directory, windows, asked.shards, asked.pattern, asked.dtype, work.prefix("blocks")), work


def idle_worker() -> int:
    """Private bytes of a worker that has imported what our work imports, and done nothing."""
    import workflows.blockwork
    import workflows.pruning.solvers  # noqa: F401

    return private_memory()[0]


def drive(directory: Path, asked: argparse.Namespace, events: Events) -> None:
    """In a process of its own: the blocks that are not recorded yet, up to the number asked for."""
    import ray

    from cluster.errors import Cancelled
    from cluster.layerwise import run_blocks
    from cluster.session import session
    from cluster.spec import ClusterSpec

    stage, work = stage_for(directory, asked)
    began = [time.monotonic()]

    def on_block(block: int, stored) -> None:
        work.record_block(block, stored)
        events.note("block", block=block, seconds=time.monotonic() - began[0], bytes=stored.size)
        began[0] = time.monotonic()

    with session(ClusterSpec(), cpus=2):
        events.note("baseline", bytes=ray.get(ray.remote(num_cpus=1)(idle_worker).remote()))
        events.note("store", bytes=int(ray.cluster_resources()["object_store_memory"]))
        began[0] = time.monotonic()
        with suppress(Cancelled):
            run_blocks(
                stage, ClusterSpec(workers=2), 1, work.finished_blocks(), on_block,
                stop=lambda: len(work.finished_blocks()) >= asked.blocks,
            )  # fmt: skip


def attempt(directory: Path, words: list[str], events: Events, kill: bool) -> None:
    """One driver, watched from its start to its end; killed within the second block when asked."""
    done = len(events.of("block"))
    began = time.time()
    driver = subprocess.Popen([sys.executable, __file__, *words, "--drive"], start_new_session=True)
    watch = WorkerWatch(driver.pid)
    watch.start()
    killed = False
    try:
        while driver.poll() is None:
            time.sleep(0.1)
            if kill and len(events.of("block")) > done and "solve" in watch.roles:
                events.note("killed", process=driver.pid, recorded=len(events.of("block")))
                killed = True
                end(driver)
    finally:
        if driver.poll() is None:
            end(driver)
        looks = [[round(one.at - began, 2), *list(vars(one).values())[1:]] for one in watch.stop()]
        events.note("watched", began=began, seconds=time.time() - began, looks=looks)
    if driver.returncode and not killed:
        raise SystemExit(f"the driver ended with {driver.returncode}")


def end(driver: subprocess.Popen) -> None:
    """Kills a driver without a word; its Ray ends with it, or is ended after a while."""
    tree = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + PATIENCE
    while alive := [one for one in tree if is_alive(one)]:
        if time.monotonic() > deadline:
            for one in alive:
                one.kill()
        time.sleep(0.2)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that nobody asked how it ended does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def digest_of(directory: Path) -> str:
    """The digest of the source's files, read anew."""
    import hashlib

    from cluster.storage import open_store
    from workflows.models.digests import digests

    store = open_store(str(directory / "model"))
    sizes = {path.name: path.stat().st_size for path in sorted((directory / "model").iterdir())}
    with tempfile.TemporaryDirectory() as cache:
        found = digests(store, sizes, Path(cache))
    return hashlib.sha256("".join(f"{one.key} {one.sha256}\n" for one in found).encode()).hexdigest()


def check_whole(directory: Path, asked: argparse.Namespace) -> dict[str, int]:
    """Every tensor of the model read once: those of pruned blocks from their files, the rest from the source.

    Raises:
        AssertionError: one is missing, misshapen, not finite, changed where it must not be, or not pruned.
    """
    import torch
    from big_checkpoint import shapes_of

    from workflows.models.checkpoint import Checkpoint, read_block_file
    from workflows.pruning import patterns

    stage, work = stage_for(directory, asked)
    dense = Checkpoint(stage.before)
    missing = shapes_of(stage.before.config)
    linears = {one.linear for one in stage.units()}
    counts = {"tensors": len(missing), "pruned": 0, "bytes": 0}

    def look(name: str, tensor: torch.Tensor) -> None:
        assert tuple(tensor.shape) == missing.pop(name), name
        assert bool(torch.isfinite(tensor).all()), name
        counts["bytes"] += tensor.nbytes

    finished = work.finished_blocks()
    assert len(finished) == asked.blocks
    for block, stored in enumerate(finished):
        assert work.store.verify(stored), stored.key
        for name, tensor in read_block_file(work.store, stored.key, f"model.layers.{block}."):
            look(f"model.layers.{block}.{name}", tensor)
            if name.removesuffix(".weight") in linears:
                patterns.verify(tensor, asked.pattern, 0.5)
                counts["pruned"] += 1
            else:
                assert torch.equal(tensor, dense.read(f"model.layers.{block}.{name}")), name
    for block in range(len(finished), stage.block_count):
        for name, tensor in dense.read_block(block):
            look(f"model.layers.{block}.{name}", tensor)
    for name in dense.outer_names:
        look(name, dense.read(name))
    assert not missing, missing
    return counts


def watched(events: Events) -> tuple[list[Look], list[tuple[float, str]], int]:
    """All looks with the attempts laid end to end, marks on that axis, and the baseline."""
    looks, marks, offset = [], [], 0.0
    for one in (one for one in events.of("watched") if one["looks"]):  # not a Ray that did not start
        looks += [Look(at + offset, *rest) for at, *rest in one["looks"]]
        for what in ("block", "killed"):
            marks += [
                (event["at"] - one["began"] + offset, f"block {event['block']}" if what == "block" else "driver killed")
                for event in events.of(what)
                if 0 <= event["at"] - one["began"] <= one["seconds"]
            ]
        offset += one["seconds"]
    return looks, marks, max(one["bytes"] for one in events.of("baseline"))


def plot(looks: list[Look], marks: list[tuple[float, str]], baseline: int) -> None:
    """Private memory of every process over time, coloured by what it was at."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for number, role in enumerate(ROLES):
        own = [one for one in looks if one.role == role]
        axes.scatter(
            [one.at / 60 for one in own], [(one.private - baseline) / GIB for one in own],
            s=4, color=f"C{number}", label=ROLES[role], rasterized=True,
        )  # fmt: skip
    axes.axhline(LIMIT / GIB, color="black", linewidth=1, linestyle="--")
    for at, text in marks:
        axes.axvline(at / 60, color="gray", linewidth=0.5)
        axes.annotate(text, (at / 60, 3.05), rotation=90, fontsize=7, ha="right", va="bottom")
    axes.set(xlabel="minutes", ylabel="GiB of private memory above an idle worker", ylim=(-0.1, 3.8))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)
    figure.savefig(PLOT, metadata={"Date": None, "Creator": None}, dpi=150)


def table(events: Events, asked: argparse.Namespace, looks: list[Look], baseline: int, whole: dict[str, int]) -> str:
    """The page's figures."""
    import ray
    import torch

    found = peaks(looks, baseline)
    shared = {role: max(one.shared for one in looks if one.role == role) for role in found}
    rows = [
        f"| {ROLES[role]} | {found[role] / GIB:.2f} | {shared[role] / GIB:.2f} |" for role in ROLES if role in found
    ]
    blocks = events.of("block")
    seconds = [f"{one['block']}: {one['seconds']:.0f}" for one in blocks]
    at_once: dict[float, dict[int, int]] = {}
    for one in looks:
        own = at_once.setdefault(round(one.at), {})
        own[one.process] = max(own.get(one.process, 0), one.private)
    together = max(sum(own.values()) for own in at_once.values())
    killed = events.of("killed")[0]
    memory = psutil.virtual_memory().total / GIB
    lines = [
        f"Machine: {os.cpu_count()} CPU cores, {memory:.0f} GiB, {platform.machine()}."
        f" {date.today()}; torch {torch.__version__}, ray {ray.__version__}.",
        f"{asked.blocks} blocks of {LLAMA_3_8B['num_hidden_layers']}, {asked.pattern}, sparsegpt;"
        f" {asked.windows} windows of {asked.length} tokens in {asked.shards} shards, {asked.dtype}; 2 workers of one"
        " thread.",
        f"Object store: {events.of('store')[-1]['bytes'] / GIB:.1f} GiB"
        f" (RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION={os.environ['RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION']}).",
        "",
        "| process | peak, GiB private above an idle worker | peak, GiB of shared pages mapped |",
        "|---|---|---|",
        *rows,
        "",
        f"Limit: {LIMIT / GIB:g} GiB. An idle worker with our imports: {baseline / GIB:.2f} GiB private. All worker"
        f" processes together: {together / GIB:.1f} GiB private at most, baselines included.",
        "",
        f"Seconds by block: {', '.join(seconds)}; the first one after a start is with imports and catching up. The"
        f" driver was killed with {killed['recorded']} block(s) recorded and the next one being solved; later ones"
        f" ({len(events.of('store')) - 1}) went on there.",
        "",
        f"Afterwards: {whole['tensors']} of {whole['tensors']} tensors ({whole['bytes'] / 1e9:.2f} GB) read,"
        f" {whole['pruned']} pruned ones with their pattern verified, from block files of"
        f" {blocks[0]['bytes'] / 1e6:.0f} MB; the others as in the source, whose digest is the same before and after"
        f" ({events.of('digest')[0]['sha256'][:12]}).",
    ]
    return "\n".join(lines)


def main() -> int:
    """Checkpoint, digest, drivers until the blocks are there, digest, checks, page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--drive", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.directory.mkdir(parents=True, exist_ok=True)
    events = Events(asked.directory / "events.jsonl")
    if asked.drive:
        drive(asked.directory, asked, events)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    write_checkpoint(asked.directory / "model")
    if not events.of("digest"):
        events.note("digest", sha256=digest_of(asked.directory))
    while len({one["block"] for one in events.of("block")}) < asked.blocks:
        attempt(asked.directory, sys.argv[1:], events, kill=not events.of("killed"))
    if len(events.of("digest")) < 2:
        events.note("digest", sha256=digest_of(asked.directory))
    assert events.of("digest")[0]["sha256"] == events.of("digest")[1]["sha256"], "the source was changed"
    if not events.of("whole"):
        events.note("whole", **check_whole(asked.directory, asked))
    whole = {name: events.of("whole")[0][name] for name in ("tensors", "pruned", "bytes")}
    looks, marks, baseline = watched(events)
    plot(looks, marks, baseline)
    put(PAGE, table(events, asked, looks, baseline, whole))
    over = {role: peak for role, peak in peaks(looks, baseline).items() if peak > LIMIT}
    print("over 3 GiB: " + json.dumps(over) if over else "every process stays under 3 GiB")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
