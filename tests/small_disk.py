"""A real disk that fills up."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path


class SmallDisk:
    """A real file system that fills up: a tmpfs of some MiB. Needs the right to mount; see `can_mount`."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size

    def __enter__(self) -> "SmallDisk":
        self.path.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "none", self.path], check=True)
        return self

    def __exit__(self, *error) -> None:
        for _ in range(50):  # somebody may still have a file open
            if subprocess.run(["umount", self.path], check=False, capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        subprocess.run(["umount", "-l", self.path], check=True)

    def leave(self, free: int) -> None:
        """Fills it up but for `free` bytes."""
        filler = self.path / ".filler"
        filler.unlink(missing_ok=True)
        room = shutil.disk_usage(self.path).free - free
        if room > 0:
            filler.write_bytes(bytes(room))

    def make_room(self) -> None:
        """The operator frees the disk."""
        (self.path / ".filler").unlink(missing_ok=True)


def can_mount() -> bool:
    """Whether this user may mount a tmpfs here."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as directory:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], check=False)
        if mounted.returncode == 0:
            subprocess.run(["umount", directory], check=True)
        return mounted.returncode == 0
