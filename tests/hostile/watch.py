"""Watches what a reader does to the process, the machine and the files while it refuses something."""

import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class",
    "marshal.loads", "socket.connect", "socket.bind", "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir",
    "os.symlink", "os.link", "shutil.rmtree",
)  # fmt: skip
LIBRARIES = tuple(
    str(Path(place).resolve())
    for place in (*sysconfig.get_paths().values(), sys.base_prefix, sys.prefix, Path(__file__).parents[2])
)


@dataclass
class Watched:
    """What was seen."""

    seconds: float = 0.0  # of this process's own work: other work on the machine does not count
    waited: float = 0.0  # by the clock
    grown: int = 0
    acts: list[str] = field(default_factory=list)


_watching: list[tuple[Watched, Path]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    watched, folder = _watching[-1]
    if event in FORBIDDEN:
        # A reader may work in a temporary directory of its own; what is left behind is checked by comparing files.
        if event.startswith(("os.", "shutil.")) and all(_temporary(one, folder) for one in arguments if _is_path(one)):
            return
        if event == "marshal.loads" or event == "ctypes.dlopen":
            return  # Python's own, when it imports a library for the first time
        watched.acts.append(f"{event} {arguments!r:.200}")
    elif event == "exec" and not _of_a_library(arguments[0].co_filename):
        watched.acts.append(f"exec of {arguments[0].co_filename}")
    elif event == "open" and _writes(arguments) and not _temporary(arguments[0], folder):
        watched.acts.append(f"open for writing {arguments!r:.200}")


sys.addaudithook(_hook)


@contextmanager
def watching(folder: Path) -> Iterator[Watched]:
    """Notes what happens inside: acts that a reader has no business with, time, growth of the memory's peak."""
    watched = Watched()
    before = _reset_peak()
    _watching.append((watched, folder))
    started, worked = time.perf_counter(), time.process_time()
    try:
        yield watched
    finally:
        watched.waited = time.perf_counter() - started
        watched.seconds = time.process_time() - worked
        _watching.pop()
        watched.grown = _memory("VmHWM") - before


def _reset_peak() -> int:
    """Bytes in memory now, from which the peak is counted afresh."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field_name: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(field_name))
    return int(line.split()[1]) * 1024


def _is_path(value: Any) -> bool:
    return isinstance(value, str | bytes | os.PathLike)


def _temporary(path: Any, folder: Path) -> bool:
    if isinstance(path, int):
        return True  # a descriptor that is open already
    place = os.path.realpath(os.fsdecode(path))
    return place.startswith((str(folder.resolve()), "/dev/", "/tmp/", "/proc/self/"))


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(mode and set(mode) & set("wax+")) or (mode is None and bool(flags & (os.O_WRONLY | os.O_RDWR)))


def _of_a_library(filename: str) -> bool:
    """Code of installed packages and our own, or what these make up (dataclasses, named tuples)."""
    return filename.startswith(("<", *LIBRARIES))
