"""Many publishers of one version at once, each with a model of its own: who wins, and how long the commit takes.

Real processes with threads, a real S3 server. In every round all publishers lay their release out, meet at a barrier
right before the commit, and send it together. Prints one JSON object; exits with 1 when a round had not exactly one
winner, a loser was not told, or the pointer is not the winner's.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import InputError
from cluster.local_s3 import LocalS3
from cluster.storage import Store, open_store
from workflows.publishing import publish
from workflows.release import find_version

PATIENCE = 300  # seconds at the barrier


def compete(
    store: Store, number: int, rounds: int, barrier: Any, deadline: float, results: list[dict[str, Any]]
) -> None:
    """One publisher, in every round; notes how each ended for it."""
    seconds: list[float] = []
    create = store.create

    def create_together(key: str, data: bytes) -> bool:
        barrier.wait(PATIENCE)
        began = time.monotonic()
        made = create(key, data)
        seconds.append(time.monotonic() - began)
        return made

    store.create = create_together  # type: ignore[method-assign]
    files = {"config.json": store.put(f"runs/racer-{number}/config", f'{{"racer": {number}}}'.encode())}
    for turn in range(rounds):
        # One looks at the time for all, between two barriers: else some would wait for others that went home.
        if barrier.wait(PATIENCE) == 0 and time.monotonic() > deadline:
            Path(os.environ["RACE_STOP"]).touch()
        barrier.wait(PATIENCE)
        if Path(os.environ["RACE_STOP"]).exists():
            return
        mine = {"round": turn, "racer": number, "outcome": "won", "error": ""}
        try:
            papers = {"REPORT.json": f'{{"racer": {number}}}'.encode()}
            done = publish(store, f"race-{turn}", "gold", files, papers, f"run-{number}")
            mine["outcome"] = "already" if done.already else "won"
        except InputError as error:
            mine |= {"outcome": "told" if "holds another model" in error.message else "failed", "error": error.message}
        except Exception as error:  # a benchmark reports whatever happens
            mine |= {"outcome": "failed", "error": f"{type(error).__name__}: {error}"}
        mine["seconds"] = seconds[-1] if seconds else 0.0
        results.append(mine)


def process(uri: str, numbers: list[int], rounds: int, barrier: Any, deadline: float, queue: Any) -> None:
    """Several publishers as threads of one process."""
    results: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=compete, args=(open_store(uri), number, rounds, barrier, deadline, results))
        for number in numbers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.put(results)


def race(uri: str, publishers: int, rounds: int, processes: int, minutes: float) -> dict[str, Any]:
    """Runs the rounds, as many as the time allows, and judges each."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(publishers), context.Queue()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["RACE_STOP"] = f"{directory}/stop"
        children = [
            context.Process(
                target=process,
                args=(uri, list(range(publishers))[start::processes], rounds, barrier, began + minutes * 60, queue),
            )
            for start in range(processes)
        ]
        for child in children:
            child.start()
        results = [one for _ in children for one in queue.get()]
        for child in children:
            child.join()
    took = time.monotonic() - began
    store = open_store(uri)
    done = max((one["round"] for one in results), default=-1) + 1
    wrong = []
    for turn in range(done):
        mine = [one for one in results if one["round"] == turn]
        winners = [one["racer"] for one in mine if one["outcome"] == "won"]
        told = sum(one["outcome"] == "told" for one in mine)
        pointer = find_version(store, f"race-{turn}", "gold")
        if len(winners) != 1 or told != publishers - 1 or pointer is None or pointer.run != f"run-{winners[0]}":
            wrong.append({"round": turn, "winners": winners, "told": told, "pointer": pointer and pointer.run})
    commits = np.array([one["seconds"] for one in results])
    return {
        "publishers": publishers,
        "processes": processes,
        "rounds": done,
        "rounds_asked": rounds,
        "rounds_with_exactly_one_winner": done - len(wrong),
        "losers_told": sum(one["outcome"] == "told" for one in results),
        "different_winners": len({one["racer"] for one in results if one["outcome"] == "won"}),
        "failed": [one for one in results if one["outcome"] == "failed"][:5],
        "wrong": wrong[:5],
        "seconds": round(took, 1),
        "commit_ms": {
            f"p{share}": round(float(np.percentile(commits, share)) * 1000, 1) for share in (50, 90, 99, 100)
        },
    }


def main() -> int:
    """Reads the options and runs against a server of its own, or against a store that is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publishers", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10.0, help="no new round begins after this")
    parser.add_argument("--store", help="an s3:// prefix or directory; without it a SeaweedFS is started")
    options = parser.parse_args()
    rest = (options.publishers, options.rounds, options.processes, options.minutes)
    if options.store:
        found = race(options.store, *rest)
    else:
        with tempfile.TemporaryDirectory() as directory, LocalS3(Path(directory), bucket="race") as server:
            os.environ.update(server.environment())
            found = race("s3://race/store", *rest)
    print(json.dumps(found, indent=1))
    return 1 if found["wrong"] or found["failed"] or not found["rounds"] else 0


if __name__ == "__main__":
    sys.exit(main())
