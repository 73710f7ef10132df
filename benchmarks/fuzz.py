"""Fuzzes the parsers of our own formats, guided by coverage when atheris is installed (Python 3.11), else at random.

    python benchmarks/fuzz.py --seconds 60 [--format header] [--seed 1]

Ends with code 1 at the first finding, whose bytes it prints. One line per format: executions, how many were taken.
"""

import argparse
import multiprocessing
import random
import resource
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

try:
    import atheris
except ImportError:
    atheris = None

SLOWEST = 1.0  # seconds of one input
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"-",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b"\xff",
    b"\0",
    b"&a ",
    b"*a",
    b"!!",
    b"\\ud800",
    b"../",
]


def mutate(data: bytes, choose: random.Random) -> bytes:
    """A few cuts, doublings and insertions."""
    content = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at, size = choose.randint(0, len(content)), choose.choice([0, 1, 1, 2, 8, 64])
        piece = choose.choice(
            [choose.randbytes(choose.randint(0, 8)), choose.choice(PIECES), bytes(content[at : at + size]) * 3]
        )
        content[at : at + size] = piece
    return bytes(content[: 1 << 16])


def fuzz(name: str, seconds: float, seed: int) -> None:
    """Fuzzes one format in this process until its time is up."""
    if atheris:
        with atheris.instrument_imports(include=["jobs", "workflows", "cluster", "yaml", "json"]):
            from hostile.formats import FORMATS
    else:
        from hostile.formats import FORMATS
    form = FORMATS[name]
    counts = {"all": 0, "taken": 0}
    slowest = 0.0
    ends = time.monotonic() + seconds
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(content: bytes) -> None:
        nonlocal slowest
        if time.monotonic() > ends:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) >> 10
            how = "coverage" if atheris else "random"
            print(f"| {name} | {how} | {counts['all']} | {counts['taken']} | {slowest:.2f} | {grown} |", flush=True)
            import os

            os._exit(0)
        counts["all"] += 1
        started = time.process_time()
        try:
            form.read(content)
            counts["taken"] += 1
        except form.refusals:
            pass
        except BaseException:
            print(f"{name}: finding: {content!r}", flush=True)
            raise
        took = time.process_time() - started
        slowest = max(slowest, took)
        if took > SLOWEST:
            print(f"{name}: {took:.1f} s for {content!r:.2000}", flush=True)
            raise SystemExit(1)

    choose = random.Random(seed)
    if atheris:

        def mutator(data: bytes, most: int, seed: int) -> bytes:
            start = data if len(data) > 8 and seed % 4 else form.good
            return (atheris.Mutate(start, most) if seed % 2 else mutate(start, random.Random(seed)))[:most]

        atheris.Setup(
            ["fuzz", f"-seed={seed}", "-max_len=65536", "-verbosity=0", "-rss_limit_mb=4096"],
            one,
            custom_mutator=mutator,
        )
        atheris.Fuzz()
    corpus = [form.good]
    while True:
        content = mutate(choose.choice(corpus), choose)
        before = counts["taken"]
        one(content)
        if counts["taken"] > before and len(corpus) < 1000:
            corpus.append(content)


def main() -> None:
    """Each format in a process of its own, one after the other."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=60, help="for each format")
    arguments.add_argument("--format", help="only this one")
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    names = ("job", "header", "archive", "json", "pointer", "manifest", "started", "progress", "ended")
    print(
        "| format | inputs by | executions | taken | slowest, CPU s | memory grown, MiB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    failed = 0
    for name in [given.format] if given.format else names:
        process = multiprocessing.get_context("spawn").Process(target=fuzz, args=(name, given.seconds, given.seed))
        process.start()
        process.join(given.seconds + 300)
        if process.is_alive():
            process.kill()
        failed += process.exitcode != 0
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
