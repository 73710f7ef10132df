"""Reads a checkpoint lazily: an index of tensors, one block or some rows at a time, never the whole."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import safetensors.torch
import torch

from cluster.errors import InputError
from cluster.storage import Store, open_store
from workflows.models.expert_names import is_router, one_by_one
from workflows.models.families import family_of
from workflows.models.safetensors_header import TensorInfo, read_header
from workflows.models.state import ModelState

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS_READ_AT_ONCE = 8 << 20  # bytes; one request's worth when rows of an embedding are picked


class Checkpoint:
    """The tensors of a model state. Picklable; opens files only when asked for tensors."""

    def __init__(self, state: ModelState) -> None:
        self.state = state
        self._source = open_store(state.source)
        self._store = open_store(state.store)

    def read_block(
        self, block: int, wanted: Callable[[str], bool] = lambda name: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of one block, one at a time, names relative to the block ("mlp.down_proj.weight").

        Args:
            block: its number.
            wanted: whether a tensor of this name is read.

        Raises:
            InputError: the source has no tensor of this block.
        """
        prefix = self.state.prefix(block)
        if self.state.blocks:
            yield from read_block_file(self._store, self.state.blocks[block].key, prefix, wanted)
            return
        names = [name for name in self._index if name.startswith(prefix)]
        if not names:
            raise InputError(f"{self.state.source}: no tensor named {prefix}*; the checkpoint is incomplete")
        for name in names:
            if wanted(own := name.removeprefix(prefix)):
                yield own, self.read(name)

    def read_linear_rows(self, block: int, linear: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of one linear's weight [rows, in] in the stored dtype; only these bytes are read."""
        name = f"{self.state.prefix(block)}{linear}.weight"
        if not self.state.blocks:
            return rows_of(self._source, *self._index_entry(name), start, stop)
        key = self.state.blocks[block].key
        return rows_of(self._store, key, header(self._store, key)[name], start, stop)

    def read_outer(self) -> dict[str, torch.Tensor]:
        """All tensors outside the blocks (embeddings, final norm, head), by their full names."""
        return {name: self.read(name) for name in self.outer_names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its full name, from headers alone."""
        outer = {name: info.shape for name, (_, info) in self._index.items()}
        if not self.state.blocks:
            return outer
        blocks = {n: i.shape for one in self.state.blocks for n, i in header(self._store, one.key).items()}
        return {name: outer[name] for name in self.outer_names} | blocks

    @property
    def outer_names(self) -> list[str]:
        """Full names of the tensors outside the blocks, sorted."""
        return sorted(name for name in self._index if not self._in_a_block(name))

    def is_prunable(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor, by its full name, is one that may be pruned: a matrix in a block that does not route."""
        return self._in_a_block(name) and len(shape) == 2 and not is_router(name.removesuffix(".weight"))

    def read(self, name: str) -> torch.Tensor:
        """One tensor of the source by its full name."""
        file, info = self._index_entry(name)
        return as_tensor(self._source.read(file, info.start, info.end - info.start), info, info.shape)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Chosen rows [n, in] of a source matrix, read in bounded pieces so that it is never held whole.

        Args:
            name: full tensor name of a matrix.
            rows: sorted, unique row numbers.
        """
        file, info = self._index_entry(name)
        row_bytes = (info.end - info.start) // info.shape[0]
        per_read = max(1, ROWS_READ_AT_ONCE // row_bytes)
        picked = []
        for first in range(0, info.shape[0], per_read):
            inside = rows[(rows >= first) & (rows < first + per_read)]
            if len(inside):
                low, high = int(inside[0]), int(inside[-1]) + 1
                picked.append(rows_of(self._source, file, info, low, high)[inside - low])
        return torch.cat(picked)

    @cached_property
    def _index(self) -> dict[str, tuple[str, TensorInfo]]:
        """Full tensor name → (file, place in it), over all shards of the source."""
        index = self._source.get("model.safetensors.index.json") if self._has_index else None
        files = sorted(set(json.loads(index)["weight_map"].values())) if index else ["model.safetensors"]
        headers = {file: as_run(header(self._source, file), self.state.config) for file in files}
        return {name: (file, info) for file, tensors in headers.items() for name, info in tensors.items()}

    def _in_a_block(self, name: str) -> bool:
        return name.startswith(f"{family_of(self.state.config).layers}.")

    @property
    def _has_index(self) -> bool:
        return self._source.size("model.safetensors.index.json") is not None

    def _index_entry(self, name: str) -> tuple[str, TensorInfo]:
        if name not in self._index:
            raise InputError(f"{self.state.source}: tensor {name} is missing; the checkpoint is incomplete")
        return self._index[name]


def as_run(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """A file's tensors by the names that they are run under: experts one by one, without what nobody reads.

    Raises:
        InputError: a matrix is there twice, fused and alone.
    """
    forgotten = family_of(config).forgotten
    return one_by_one({name: info for name, info in tensors.items() if name not in forgotten}, config)


def read_block_file(
    store: Store, key: str, prefix: str, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted tensors of a block that a run wrote, one at a time, names without the block's `prefix`."""
    for name, info in header(store, key).items():
        if wanted(own := name.removeprefix(prefix)):
            yield own, as_tensor(store.read(key, info.start, info.end - info.start), info, info.shape)


def block_file(prefix: str, tensors: dict[str, torch.Tensor]) -> bytes:
    """The safetensors bytes of one block, tensors under their full names; such a file is a release's shard."""
    full = {f"{prefix}{name}": tensor.contiguous() for name, tensor in sorted(tensors.items())}
    return safetensors.torch.save(full, metadata={"format": "pt"})


def header(store: Store, key: str) -> dict[str, TensorInfo]:
    """Names and places of the tensors in one safetensors file.

    Raises:
        InputError: the file is missing or its header is no valid safetensors header.
    """
    size = store.size(key)
    if size is None:
        raise InputError(f"{store.uri}: file {key} is missing")
    return read_header(partial(store.read, key), size).tensors


def rows_of(store: Store, key: str, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop of a matrix; only their bytes are read."""
    row_bytes = (info.end - info.start) // info.shape[0]
    data = store.read(key, info.start + start * row_bytes, (stop - start) * row_bytes)
    return as_tensor(data, info, (stop - start, *info.shape[1:]))


def as_tensor(data: bytes, info: TensorInfo, shape: Iterable[int]) -> torch.Tensor:
    """Raw bytes as a tensor of its own memory."""
    if info.dtype not in DTYPES:
        raise InputError(f"a tensor has dtype {info.dtype}; allowed: {', '.join(DTYPES)}")
    return torch.frombuffer(bytearray(data), dtype=DTYPES[info.dtype]).reshape(tuple(shape))
