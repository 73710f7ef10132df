"""Where a stage's CPU seconds go: its parts, wrapped by clocks. Each moment counts for the innermost part only."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import workflows.blockwork as blockwork
import workflows.following as following
import workflows.observing as observing
from cluster.storage import open_store
from workflows.blockwork import PruneStage
from workflows.models.checkpoint import Checkpoint
from workflows.models.decoder import Decoder
from workflows.models.passes import Pass


class Clocks:
    """CPU seconds of this process by part. A part that begins stops the clock of the part around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._around: list[str] = ["the rest"]
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._around[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted as this part."""

        def call(*arguments: Any, **named: Any) -> Any:
            self._switch()
            self._around.append(part)
            try:
                return function(*arguments, **named)
            finally:
                self._switch()
                self._around.pop()

        return call


def seconds_by_part(stage: PruneStage, work: Callable[[PruneStage], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns for the stage, and `parts`: CPU seconds of each part."""
    clocks = Clocks()
    store = type(open_store(stage.before.store))
    where: list[tuple[Any, str, str]] = [
        (Pass, "__next__", "forward passes"),
        (observing, "add_inputs", "Grams"),
        (PruneStage, "prepare", "factors of the Grams"),
        (PruneStage, "solve", "solves"),
        (Checkpoint, "read_linear_rows", "weights read"),
        (Checkpoint, "read_block", "weights read"),
        (Decoder, "block", "weights read"),
        (following, "read_block_file", "weights read"),
        (store, "put", "blocks written"),
        (blockwork, "block_file", "blocks written"),
        (blockwork.patterns, "verify", "patterns verified"),
    ]
    patches = [patch.object(owner, name, clocks.timed(part, getattr(owner, name))) for owner, name, part in where]
    for one in patches:
        one.start()
    try:
        told = work(stage)
        clocks._switch()
    finally:
        for one in patches:
            one.stop()
    parts = dict(sorted(clocks.seconds.items(), key=lambda one: -one[1]))
    return {**told, "parts": {name: round(value, 2) for name, value in parts.items()}}
