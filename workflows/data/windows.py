"""Text becomes windows of exactly as many tokens as a recipe says, always the same ones."""

import io
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import InputError
from workflows.data.sources import fingerprint, read_documents
from workflows.recipe import Data, DataSource


@dataclass(frozen=True)
class Windows:
    """Token windows of one role.

    Attributes:
        tokens: [windows, length] int32; each begins with BOS if the tokenizer has one. Of labelled sentences a list,
            each [its own length] int32.
        slices: one name per window.
        labels: of sentences, the number of each one's class.
    """

    tokens: np.ndarray | list[np.ndarray]
    slices: list[str]
    labels: list[int] | None = None

    def part(self, low: int, high: int) -> "Windows":
        """Windows low..high."""
        labels = None if self.labels is None else self.labels[low:high]
        return Windows(tokens=self.tokens[low:high], slices=self.slices[low:high], labels=labels)

    def in_turn(self) -> list[int]:
        """Numbers of all windows, one of each slice in turn: any first few of them are of as many slices as can be."""
        seen: Counter[str] = Counter()
        turns = []
        for number, label in enumerate(self.slices):
            turns.append((seen[label], number))
            seen[label] += 1
        return [number for _, number in sorted(turns)]

    def wanted(self, window: int) -> np.ndarray:
        """What should be predicted of a window, int64: its own tokens [length], or the class of a sentence []."""
        return np.asarray(self.tokens[window] if self.labels is None else self.labels[window], dtype=np.int64)


def build_all(data: Data, tokenizer: Any, seed: int) -> dict[str, Windows]:
    """The windows of all three roles.

    Raises:
        InputError: a source cannot be read, gives too little text, or two roles share text.
    """
    roles: dict[str, DataSource] = {
        "calibration": data.calibration,
        "tuning": data.tuning,
        "evaluation": data.evaluation,
    }
    check_parts(roles)
    windows = {role: build_windows(role, source, tokenizer, seed) for role, source in roles.items()}
    check_disjoint(windows)
    return windows


def build_windows(role: str, source: DataSource, tokenizer: Any, seed: int) -> Windows:
    """Cuts one source into windows; documents of a slice are joined, a window never mixes slices.

    Args:
        role: named in errors.
        source: what to read; `windows` picks that many, evenly over the slices, by `seed`.
        tokenizer: a Hugging Face tokenizer.
        seed: of the choice.

    Raises:
        InputError: too little text; says how many windows there are.
    """
    by_slice: dict[str, list[str]] = {}
    for document in read_documents(source, role):
        by_slice.setdefault(document.slice, []).append(document.text)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = source.length - len(start)
    cut: dict[str, np.ndarray] = {}
    for label in sorted(by_slice):
        texts = [text + "\n\n" for text in by_slice[label]]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        stream = np.concatenate([np.asarray(one, dtype=np.int32) for one in encoded])
        count = len(stream) // body
        rows = stream[: count * body].reshape(count, body)
        starts = np.tile(np.asarray(start, dtype=np.int32), (count, 1))
        cut[label] = np.concatenate([starts, rows], axis=1)
    available = sum(len(rows) for rows in cut.values())
    wanted = source.windows or available
    if available < max(wanted, 1):
        raise InputError(
            f"data.{role}: {source.source} gives {available} windows of {source.length} tokens, not {wanted or 1}",
            "Give more text or a wider part, or ask for fewer or shorter windows.",
        )
    chosen = choose({label: len(rows) for label, rows in cut.items()}, wanted, seed)
    tokens = np.concatenate([cut[label][rows] for label, rows in chosen.items()])
    slices = [label for label, rows in chosen.items() for _ in rows]
    return Windows(tokens=tokens.astype(np.int32), slices=slices)


def choose(available: dict[str, int], wanted: int, seed: int) -> dict[str, list[int]]:
    """Which windows of each slice are taken: one more from each in turn, at random places, in order."""
    take = dict.fromkeys(available, 0)
    while sum(take.values()) < wanted:
        for label in available:
            if take[label] < available[label] and sum(take.values()) < wanted:
                take[label] += 1
    random = np.random.default_rng(seed)
    return {label: sorted(random.permutation(available[label])[:count].tolist()) for label, count in take.items()}


def check_parts(roles: dict[str, DataSource]) -> None:
    """Refuses two roles that read the same content, under whatever name, with overlapping parts.

    Raises:
        InputError: names both.
    """
    prints = {role: fingerprint(source) for role, source in roles.items()}
    for (one, a), (two, b) in combinations(roles.items(), 2):
        if prints[one] == prints[two] and a.part[0] < b.part[1] and b.part[0] < a.part[1]:
            raise InputError(
                f"data.{one} ({a.source}) and data.{two} ({b.source}) hold the same content and their parts overlap",
                "Give each its own part, for example [0.0, 0.5] and [0.5, 1.0].",
            )


def check_known(windows: dict[str, Windows], words: int, tokenizer: Any) -> None:
    """Refuses tokens that the model has no embedding for: words that were added to a tokenizer and not to the model.

    Words that no text uses are no harm: Gemma 3's text models come with one.

    Args:
        windows: by role.
        words: rows of the model's embedding, config.json's vocab_size.
        tokenizer: names the token.

    Raises:
        InputError: names role and token.
    """
    for role, one in windows.items():
        highest = max((int(row.max(initial=0)) for row in one.tokens), default=0)
        if highest >= words:
            raise InputError(
                f"data.{role}: holds token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), which the model "
                f"does not know: config.json's vocab_size is {words}",
                "Take the added word out of the tokenizer's files, or resize the model's embedding.",
            )


def check_disjoint(windows: dict[str, Windows]) -> None:
    """Refuses a window that two roles share.

    Raises:
        InputError: names both roles and how many windows they share.
    """
    seen = {role: {row.tobytes() for row in one.tokens} for role, one in windows.items()}
    for (one, a), (two, b) in combinations(seen.items(), 2):
        if shared := len(a & b):
            raise InputError(f"data.{one} and data.{two} share {shared} windows of the same text; give them other text")


def to_parquet(windows: dict[str, Windows]) -> bytes:
    """One row per window: role, slice, tokens, of sentences the label. The same windows always give the same bytes."""
    columns: dict[str, Any] = {
        "role": [role for role, one in windows.items() for _ in one.slices],
        "slice": [label for one in windows.values() for label in one.slices],
        "tokens": pa.array([row for one in windows.values() for row in one.tokens], type=pa.list_(pa.int32())),
    }
    labels = [label for one in windows.values() for label in one.labels or ()]
    if labels:
        columns["label"] = pa.array(labels, type=pa.int32())
    table = pa.table(columns)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(content: bytes) -> dict[str, Windows]:
    """The windows that `to_parquet` wrote, by role."""
    table = pq.read_table(io.BytesIO(content))
    roles = table["role"].to_numpy(zero_copy_only=False)
    windows = {}
    for role in dict.fromkeys(roles.tolist()):
        part = table.filter(pa.array(roles == role))
        rows = [row.astype(np.int32) for row in part["tokens"].combine_chunks().to_numpy(zero_copy_only=False)]
        labels = part["label"].to_pylist() if "label" in table.column_names else None
        tokens = np.stack(rows) if labels is None else rows
        windows[role] = Windows(tokens=tokens, slices=part["slice"].to_pylist(), labels=labels)
    return windows
