"""The whole chaos suite: `python benchmarks/chaos.py [CLASS ...]`. Cut off anywhere, the same command goes on.

Every case that passed the oracle is a line of build/chaos/shown.jsonl, and is not run again; `--fresh` forgets them.
One that fails is told with its traceback and stays open. The table goes into benchmarks/chaos.md.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
FOLDERS = [ROOT, TESTS, *(TESTS / name for name in ("chaos", "workflows", "end_to_end"))]
SHOWN = ROOT / "build" / "chaos" / "shown.jsonl"
PAGE = ROOT / "benchmarks" / "chaos.md"

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anybody imports Ray
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")])
sys.path[:0] = map(str, FOLDERS)

from kinds import KINDS
from pages import put
from small_disk import can_mount
from tally import Shown, table
from world import World


def read() -> list[Shown]:
    """Everything shown so far."""
    lines = SHOWN.read_text().splitlines() if SHOWN.exists() else []
    return [Shown.model_validate_json(line) for line in lines]


def missing(kinds: list[str]) -> list[tuple[str, int]]:
    """Cases that are still to be run; of every class one, then of every class another one."""
    done = {(one.kind, one.seed) for one in read()}
    cases = [
        (name, seed)
        for name in kinds
        if can_mount() or not KINDS[name].mounts
        for seed in range(KINDS[name].seeds)
        if (name, seed) not in done
    ]
    return sorted(cases, key=lambda case: case[1])


def run_place(cases: list[tuple[str, int]]) -> int:
    """Runs cases of one place in this process, in one world; how many failed."""
    failed = 0
    with World() as world:
        for name, seed in cases:
            started = time.monotonic()
            try:
                shown = KINDS[name].run(seed, world)
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"{name} {seed}: FAILED", flush=True)
                continue
            with SHOWN.open("a") as file:
                file.write(f"{shown.model_dump_json()}\n")
            print(f"{name} {seed}: {shown.injected} faults, {time.monotonic() - started:.1f} s", flush=True)
    return failed


def write_page() -> None:
    """Puts the table of what was shown into the page."""
    lines = table(read(), {name: kind.title for name, kind in KINDS.items()})
    put(PAGE, f"{lines}\nAs of {date.today()}.")


def main() -> int:
    """All places, one after another, each in a process of its own: a process can hold one Ray."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="CLASS", help=f"of {', '.join(KINDS)}; all when none is named")
    parser.add_argument("--fresh", action="store_true", help="forget what was shown before")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"no such class of faults: {', '.join(sorted(unknown))}")
    SHOWN.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        SHOWN.unlink(missing_ok=True)
    wanted = arguments.kinds or list(KINDS)
    if arguments.here:
        return 1 if run_place(missing(wanted)) else 0
    failed = 0
    for place in dict.fromkeys(KINDS[name].where for name in wanted):
        some = [name for name in wanted if KINDS[name].where == place]
        if missing(some):
            failed |= subprocess.run([sys.executable, __file__, "--here", *some], check=False).returncode
        write_page()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
