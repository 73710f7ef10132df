"""Reads a safetensors header strictly: it is the first thing of a foreign file that is believed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError
from workflows.models.strict_json import strict_json

LARGEST_HEADER = 8 << 20  # bytes; some 80 000 tensors, read in less than a second
MOST_DIMENSIONS = 8
LARGEST_SIZE = 1 << 62
BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file: byte offsets from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Names and places of a file's tensors, in the order of the header."""

    tensors: dict[str, TensorInfo]


def read_header(read: Callable[[int, int], bytes], size: int) -> Header:
    """Parses and checks a header.

    Args:
        read: gives `length` bytes from `start`.
        size: bytes in the file.

    Raises:
        InputError: no safetensors file, or one that lies about its content; names the tensor.
    """
    if size < 8:
        raise InputError("no safetensors file: it is shorter than 8 bytes")
    length = int.from_bytes(read(0, 8), "little")
    if length > LARGEST_HEADER or 8 + length > size:
        raise InputError(f"no safetensors file: its header claims {length} bytes of {size}")
    try:
        entries = strict_json(read(8, length))
    except ValueError as error:
        raise InputError(f"no safetensors file: its header is no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InputError("no safetensors file: its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("__metadata__ is no map of names to texts")
    data = 8 + length
    tensors = {name: _tensor(name, entry, data) for name, entry in entries.items()}
    end = data
    for name, info in sorted(tensors.items(), key=lambda one: (one[1].start, one[1].end)):
        if info.start != end:
            raise InputError(f"tensor {name!r}: its bytes overlap another's, or leave a gap")
        end = info.end
    if end != size:
        raise InputError(
            f"the file has {size} bytes, its tensors end at {end}: it is cut short, or holds something else"
        )
    return Header(tensors)


def _tensor(name: str, entry: Any, data: int) -> TensorInfo:
    """One entry of the header; sizes are bounded before they are multiplied."""
    short = name if len(name) < 200 else f"{name[:200]}…"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"tensor {short!r}: its entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _sizes(shape, MOST_DIMENSIONS) or not _sizes(offsets, 2) or len(offsets) != 2:
        raise InputError(f"tensor {short!r}: shape and data_offsets are no lists of sizes")
    start, end = offsets
    if not isinstance(dtype, str) or dtype not in BYTES or end - start != math.prod(shape) * BYTES[dtype]:
        raise InputError(f"tensor {short!r}: {dtype!r:.40} {shape} does not fit its bytes {start} to {end}")
    return TensorInfo(dtype, tuple(shape), data + start, data + end)


def _sizes(value: Any, most: int) -> bool:
    """Whether this is a short list of sane sizes."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(size) is int and 0 <= size <= LARGEST_SIZE for size in value)
