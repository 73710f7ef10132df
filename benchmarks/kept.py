"""Results that are kept, a line of JSON each, so that a benchmark that was cut off goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def keep(shown: Path, result: dict[str, Any]) -> None:
    """Adds one result to a file, and prints it."""
    shown.parent.mkdir(parents=True, exist_ok=True)
    with shown.open("a") as file:
        file.write(f"{json.dumps(result)}\n")
    print(result, flush=True)


def by_cell(shown: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured so far, by method and column."""
    lines = shown.read_text().splitlines() if shown.exists() else []
    return {(one["method"], one["column"]): one for one in map(json.loads, lines)}


def median_seconds(results: Sequence[dict[str, Any]]) -> str:
    """For a table's last column; a dash where nothing was timed."""
    return f"{np.median([one['seconds'] for one in results]):.0f}" if results else "–"
