"""Disk, shared memory, file descriptors."""

import os
import resource
import shutil
import tempfile
from pathlib import Path

import psutil

from jobs.checks.finding import Finding, fail, ok, warn

GIB = 1 << 30
TIGHT_DISK = 20 * GIB
FULL_DISK = 2 * GIB
RAY_STOPS_SPILLING = 0.95  # of a file system in use (Ray's local_fs_capacity_threshold)
OBJECT_STORE = 0.3  # of the memory: what Ray gives its object store by default
ENOUGH_DESCRIPTORS = 8192  # below it Ray warns that workers may not start


def disk(store: str | None) -> list[Finding]:
    """Room where Ray spills, where models are cached, and in a store that is a directory."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache"))
    places = {"disk for temporary files": Path(tempfile.gettempdir()), "disk for the cache": cache}
    if store and "://" not in store:
        places["disk of the store"] = Path(store)
    return [room(name, *usage(path)) for name, path in places.items()]


def usage(path: Path) -> tuple[Path, int, int]:
    """The nearest directory that is there, its total and free bytes."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    total, _, free = shutil.disk_usage(there)
    return there, total, free


def room(name: str, path: Path, total: int, free: int) -> Finding:
    """Free space in words. Sizes in bytes."""
    text = f"{free / GIB:.0f} of {total / GIB:.0f} GiB free at {path}"
    advice = "Free some space, or set TMPDIR (for the cache: HF_HOME) to a larger disk."
    if free < FULL_DISK:
        return fail(name, text, advice)
    if free < TIGHT_DISK:
        return warn(name, text, advice)
    if free < (1 - RAY_STOPS_SPILLING) * total and "temporary" in name:
        return warn(name, f"{text}: over {RAY_STOPS_SPILLING:.0%} full, Ray spills no more objects to it", advice)
    return ok(name, text)


def shared_memory() -> list[Finding]:
    """/dev/shm against what Ray's object store takes of the memory."""
    try:
        there = shutil.disk_usage("/dev/shm").total
    except OSError:
        return [
            fail("shared memory", "there is no /dev/shm", "Karikomi needs Linux; in a container, mount a tmpfs there.")
        ]
    return [shared(there, psutil.virtual_memory().total)]


def shared(there: int, memory: int) -> Finding:
    """Whether the object store finds its place in shared memory. Sizes in bytes."""
    wanted = int(memory * OBJECT_STORE)
    text = f"/dev/shm has {there / GIB:.1f} GiB, Ray's object store takes {wanted / GIB:.1f} GiB"
    if there < wanted:
        size = f"{-(-wanted // GIB)}g"
        return warn(
            "shared memory",
            f"{text}: it then lies on disk, and everything is slow",
            f"docker run --shm-size={size}; on Kubernetes an emptyDir of medium Memory at /dev/shm; "
            f"else: mount -o remount,size={size} /dev/shm",
        )
    return ok("shared memory", text)


def descriptors() -> list[Finding]:
    """How many files a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [open_files(soft, hard)]


def open_files(soft: int, hard: int) -> Finding:
    """The limits in words; Ray opens some for each worker and each connection."""
    if soft == resource.RLIM_INFINITY or soft >= ENOUGH_DESCRIPTORS:
        return ok("open files", "no limit" if soft == resource.RLIM_INFINITY else f"{soft} at most")
    wanted = 65536
    if hard != resource.RLIM_INFINITY and hard < ENOUGH_DESCRIPTORS:
        way = f"Raise the hard limit ({hard}): /etc/security/limits.conf, LimitNOFILE of systemd, or docker --ulimit."
    else:
        way = f"ulimit -n {wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)}"
    return warn("open files", f"{soft} at most; Ray wants {ENOUGH_DESCRIPTORS}", way)
