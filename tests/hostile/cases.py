"""A hostile input: how it is made, who reads it, and what its refusal must name. New inputs are new `Case`s.

A list of cases is a module of this folder with `CASES`; `test_hostile.py` runs them all under the same watch:
refused by one of our own errors, in under a second, with little memory, nothing run, nothing written, nothing left.
"""

import functools
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CANARY = Path(tempfile.gettempdir()) / f"karikomi-canary-{os.getpid()}"


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: says what is wrong with it.
        build: makes it in an empty folder; what it gives is handed to `read`.
        read: the reader that must refuse it.
        mentions: what the refusal must name: the field or the file, and what is wrong with it.
    """

    name: str
    build: Callable[[Path], Any]
    read: Callable[[Any], object]
    mentions: tuple[str, ...]


class Bomb:
    """Leaves the canary when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def pickled_bomb() -> bytes:
    return pickle.dumps(Bomb())


def bomb_module() -> str:
    """A Python file that leaves the canary when it is imported."""
    return f"import pathlib\npathlib.Path({str(CANARY)!r}).touch()\nclass Evil: pass\n"


@functools.cache
def good_model() -> Path:
    """A tiny model that nothing is wrong with, made once; every test copies it."""
    from models_for_tests import write_tiny_model

    return write_tiny_model(Path(tempfile.mkdtemp(prefix="karikomi-good-")) / "model", layers=2, hidden=32, ffn=64)


def copied_model(folder: Path) -> Path:
    return Path(shutil.copytree(good_model(), folder / "model"))


def file(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


def edited_json(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; Ellipsis takes a field away."""
    found = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))
