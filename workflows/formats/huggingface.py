"""The stock Hugging Face directory: block files are its shards, so nothing is rewritten or held whole."""

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict

from cluster.errors import InputError
from cluster.storage import Stored, open_store
from workflows.formats import compact
from workflows.models.checkpoint import Checkpoint, header
from workflows.models.state import ModelState
from workflows.pruning import patterns
from workflows.release import model_digest
from workflows.reports.report import Size

OUTER_FILE = "model-outer.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Formatted(BaseModel):
    """A release's model files, each already in the store, and what they weigh.

    Attributes:
        files: file name in the release → object in the store.
        digest: the model digest, over all of `files`.
        size: what the model weighs.
    """

    model_config = ConfigDict(frozen=True)

    files: dict[str, Stored]
    digest: str
    size: Size


def format_release(state: ModelState, other_files: tuple[str, ...], prefix: str, form: str, sparse: bool) -> Formatted:
    """Lays a rewritten model out as a release.

    Args:
        state: the model; its blocks lie in the store.
        other_files: names of the source's tokenizer and generation files, taken over as they are.
        prefix: where new objects of this step go.
        form: "huggingface" or "compact" (see `workflows.formats.compact`).
        sparse: the pattern is one of zeros; only then they are counted and the archive form is weighed.
    """
    assert state.blocks, "a dense model has nothing to format"
    store, source, checkpoint = open_store(state.store), open_store(state.source), Checkpoint(state)
    outer = checkpoint.read_outer()
    weights = {OUTER_FILE: store.put(f"{prefix}/{OUTER_FILE}", _save(outer))}
    weights |= {block_name(number): stored for number, stored in enumerate(state.blocks)}
    zeros = 0
    packed: dict[str, Stored] = {}
    for name, stored in weights.items():
        if not sparse:
            break
        data = store.get(stored.key)
        if name != OUTER_FILE:
            linears = [
                one for full, one in safetensors.torch.load(data).items() if checkpoint.is_prunable(full, one.shape)
            ]
            zeros += sum(patterns.zeros(one) for one in linears)
        packed[name] = store.put(f"{prefix}/compact/{name}", compact.pack_bytes(data))
    dense_bytes = sum(one.size for one in weights.values())
    index = {
        "metadata": {"total_size": dense_bytes},
        "weight_map": {tensor: name for name, stored in weights.items() for tensor in header(store, stored.key)},
    }
    texts = {"config.json": _json(state.config), INDEX_FILE: _json(index)}
    small_files = {name: store.put(f"{prefix}/{name}", text) for name, text in texts.items()}
    small_files |= {name: store.put(f"{prefix}/{name}", source.get(name)) for name in other_files}
    files = small_files | (packed if form == "compact" else weights)
    return Formatted(
        files=files,
        digest=model_digest(files),
        size=Size(
            **counts(checkpoint),
            zeros=zeros,
            weight_bytes=dense_bytes,
            compact_bytes=sum(one.size for one in packed.values()) if sparse else None,
        ),
    )


def dense_size(state: ModelState, weight_bytes: int) -> Size:
    """What the dense model weighs, from headers alone; weights that happen to be zero are not counted."""
    return Size(**counts(Checkpoint(state)), zeros=0, weight_bytes=weight_bytes, compact_bytes=None)


def counts(checkpoint: Checkpoint) -> dict[str, int]:
    """All parameters (tied ones once), and those of the linears inside blocks."""
    shapes = checkpoint.shapes()
    linears = [shape for name, shape in shapes.items() if checkpoint.is_prunable(name, shape)]
    return {
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "block_parameters": sum(math.prod(shape) for shape in linears),
    }


def block_name(block: int) -> str:
    """File name of a block's shard in a release."""
    return f"model-block-{block:05d}.safetensors"


def _save(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def unpack_directory(directory: Path) -> None:
    """Makes a stock directory of a fetched compact release, in place, one file at a time.

    Raises:
        InputError: a file is no archive, or does not fit together; names it.
    """
    for file in sorted(directory.glob("*.safetensors")):
        try:
            whole = compact.unpack_bytes(file.read_bytes())
        except ValueError as error:
            raise InputError(f"{file.name}: {error}") from error
        file.write_bytes(whole)
