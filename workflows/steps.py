"""The journal: every step's result is recorded under the digest of its inputs, and nothing is done twice.

The store is the only truth. To resume is to look records up; two drivers on one run write the same records.
"""

import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog
from pydantic import BaseModel, ValidationError

from cluster.storage import MissingKey, Store, Stored
from cluster.version import VERSION
from workflows.events import Advanced, Listener, StepEnded, StepStarted

log = structlog.get_logger()
Result = TypeVar("Result", bound=BaseModel)


class NotDone(Exception):
    """Raised by a dry journal at the first step that would have to run."""

    def __init__(self, name: str, stage: int) -> None:
        super().__init__(name)
        self.name = name
        self.stage = stage


def digest(value: Any) -> str:
    """sha256 over the canonical JSON of a value (pydantic models by their fields)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=lambda one: one.model_dump(mode="json"))
    return hashlib.sha256(text.encode()).hexdigest()


class Journal:
    """Records of one run.

    Args:
        store: where the run's state lives.
        run: the run's name; its state is below runs/<run>/.
        listener: told of every step.
        dry: look only, run nothing: the first missing step raises `NotDone`.
    """

    def __init__(self, store: Store, run: str, listener: Listener, dry: bool = False) -> None:
        self.store = store
        self.root = f"runs/{run}"
        self.listener = listener
        self.dry = dry
        self.seconds: dict[str, float] = {}

    def step(
        self,
        name: str,
        inputs: dict[str, Any],
        result: type[Result],
        work: Callable[["Work"], Result],
        stage: int = 0,
    ) -> Result:
        """The step's recorded result, or else the result of doing it now.

        Args:
            name: the step's name, part of its key.
            inputs: everything that determines the result: recipe parts and digests of earlier results.
            result: type of the result.
            work: does the step; is handed a `Work` to name its objects and tell its progress.
            stage: for the listener.
        """
        key = digest({"step": name, "inputs": inputs, "version": VERSION})
        label = f"{name} {stage}" if stage else name
        recorded = self._find(key)
        if recorded is not None:
            try:
                found = result.model_validate(recorded["result"])
            except ValidationError:
                found = None  # written by other code: do it again
            if found is not None:
                self.seconds[label] = float(recorded["seconds"])
                self.listener(StepEnded(name, stage, self.seconds[label], resumed=True))
                return found
        if self.dry:
            raise NotDone(name, stage)
        self.listener(StepStarted(name, stage))
        started = time.monotonic()
        done = work(Work(self, name, stage, key))
        self.seconds[label] = time.monotonic() - started
        record = {
            "step": name,
            "key": key,
            "inputs": json.loads(json.dumps(inputs, default=lambda one: one.model_dump(mode="json"))),
            "result": done.model_dump(mode="json"),
            "seconds": round(self.seconds[label], 3),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": VERSION,
        }
        self.store.put_json(f"{self.root}/steps/{key}.json", record)
        self.listener(StepEnded(name, stage, self.seconds[label], resumed=False))
        return done

    def _find(self, key: str) -> dict[str, Any] | None:
        """The record of a step; none that can be used is the same as none.

        A write is whole or not at all, so a broken one was made by hand. What it told is then done again.
        """
        place = f"{self.root}/steps/{key}.json"
        try:
            found = self.store.get_json(place)
        except MissingKey:
            return None
        except (ValueError, RecursionError) as error:
            log.warning("no record of a step: it is done again", key=place, error=str(error))
            return None
        if isinstance(found, dict) and isinstance(found.get("seconds"), int | float) and "result" in found:
            return found
        log.warning("no record of a step: it is done again", key=place)
        return None


class Work:
    """A step that is being done: where its objects go, how far it is."""

    def __init__(self, journal: Journal, name: str, stage: int, key: str) -> None:
        self.store = journal.store
        self._journal = journal
        self._name = name
        self._stage = stage
        self._key = key[:16]

    def prefix(self, folder: str) -> str:
        """Where this step's objects of one kind go: runs/<run>/<folder>/<key>."""
        return f"{self._journal.root}/{folder}/{self._key}"

    def advanced(self, done: int, total: int, **numbers: float) -> None:
        """Tells the listener how far the step is."""
        self._journal.listener(Advanced(self._name, self._stage, done, total, numbers))

    def finished_blocks(self) -> list[Stored]:
        """Blocks that an earlier attempt at this very step recorded, in order from block 0."""
        blocks: list[Stored] = []
        try:
            while True:
                blocks.append(Stored.model_validate(self.store.get_json(self._block_record(len(blocks)))))
        except MissingKey:
            return blocks

    def record_block(self, block: int, stored: Stored) -> None:
        """Records a finished block: a resumed run goes on after it."""
        self.store.put_json(self._block_record(block), stored.model_dump())

    def _block_record(self, block: int) -> str:
        return f"{self.prefix('blocks')}/{block:05d}.json"
