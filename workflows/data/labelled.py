"""Labelled sentences: each is a window of its own, tokenised alone, never padded, with the number of its class.

Tables of sentences repeat themselves. What one role holds is passed over in the next, evaluation first, so that no
sentence is judged that the model was calibrated or tuned on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.errors import InputError
from workflows.data.sources import Document, read_documents
from workflows.data.windows import Windows, check_parts, choose
from workflows.recipe import Data, DataSource

SHOWN = 8  # labels in an error


def build_labelled(data: Data, tokenizer: Any, labels: Sequence[str], seed: int) -> dict[str, Windows]:
    """The sentences of all three roles.

    Raises:
        InputError: a source cannot be read, has a label that the model does not know or too few sentences, or two
            roles read the same rows.
    """
    roles: dict[str, DataSource] = {
        "evaluation": data.evaluation,
        "calibration": data.calibration,
        "tuning": data.tuning,
    }
    check_parts(roles)
    seen: set[bytes] = set()
    windows = {}
    for role, source in roles.items():
        windows[role] = labelled_windows(role, source, tokenizer, labels, seed, frozenset(seen))
        seen |= {row.tobytes() for row in windows[role].tokens}
    return {role: windows[role] for role in ("calibration", "tuning", "evaluation")}


def labelled_windows(
    role: str,
    source: DataSource,
    tokenizer: Any,
    labels: Sequence[str],
    seed: int,
    besides: frozenset[bytes] = frozenset(),
) -> Windows:
    """The sentences of one source, longer ones cut off at its length.

    Args:
        role: named in errors.
        source: what to read; `windows` picks that many, evenly over the slices, by `seed`.
        tokenizer: a Hugging Face tokenizer; it puts its own tokens around a sentence.
        labels: names of the model's classes.
        seed: of the choice.
        besides: tokens of sentences that are passed over.

    Raises:
        InputError: a row's label is none of the model's, its text is empty, or there are too few; names the row.
    """
    assert source.label is not None
    documents = read_documents(source, role)
    classes = [class_of(one, labels, f"data.{role}: {one.place}: {source.label!r}") for one in documents]
    encoded = tokenizer(
        [one.text for one in documents],
        truncation=True,
        max_length=source.length,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    by_slice: dict[str, list[tuple[np.ndarray, int]]] = {}
    for document, tokens, number in zip(documents, encoded, classes, strict=True):
        row = np.asarray(tokens, dtype=np.int32)
        if row.tobytes() not in besides:
            by_slice.setdefault(document.slice, []).append((row, number))
    available = sum(map(len, by_slice.values()))
    wanted = source.windows or available
    if available < max(wanted, 1):
        raise InputError(
            f"data.{role}: {source.source} gives {available} sentences that no other role holds, not {wanted or 1}",
            "Give more rows or a wider part, or ask for fewer.",
        )
    by_slice = dict(sorted(by_slice.items()))
    chosen = choose({label: len(rows) for label, rows in by_slice.items()}, wanted, seed)
    rows = [by_slice[label][number] for label, numbers in chosen.items() for number in numbers]
    return Windows(
        tokens=[tokens for tokens, _ in rows],
        slices=[label for label, numbers in chosen.items() for _ in numbers],
        labels=[number for _, number in rows],
    )


def class_of(document: Document, labels: Sequence[str], where: str) -> int:
    """The number of a sentence's class: its label is a class's name, else its number.

    Raises:
        InputError: it is neither, or the sentence is empty; `where` names row and column.
    """
    label = document.label
    assert label is not None
    if not document.text.strip():
        raise InputError(f"{where}: {label!r} is given to an empty text")
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    numbered = label if isinstance(label, int) else int(label) if label.isascii() and label.isdigit() else -1
    if not any(one.isdigit() for one in labels) and 0 <= numbered < len(labels):
        return numbered
    known = ", ".join(f"{number} ({name})" for number, name in enumerate(labels[:SHOWN]))
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    raise InputError(f"{where}: {label!r} is none of the model's classes: {known}{more}")
