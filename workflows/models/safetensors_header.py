"""Reads a safetensors header strictly: it is the first thing of a foreign file that is believed."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import InputError

LARGEST_HEADER = 100 << 20
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
        entries = json.loads(read(8, length), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"no safetensors file: its header is no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InputError("no safetensors file: its header is no JSON object")
    entries.pop("__metadata__", None)
    data = 8 + length
    tensors = {name: _tensor(name, entry, data) for name, entry in entries.items()}
    end = data
    for name, info in sorted(tensors.items(), key=lambda one: (one[1].start, one[1].end)):
        if info.start != end:
            raise InputError(f"tensor {name}: its bytes overlap another's, or leave a gap")
        end = info.end
    if end != size:
        raise InputError(
            f"the file has {size} bytes, its tensors end at {end}: it is cut short, or holds something else"
        )
    return Header(tensors)


def _tensor(name: str, entry: Any, data: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"tensor {name}: its entry is incomplete") from error
    if not whole or not isinstance(dtype, str) or dtype not in BYTES or end - start != math.prod(shape) * BYTES[dtype]:
        raise InputError(f"tensor {name}: {dtype} {list(shape)} does not fit its bytes {start} to {end}")
    return TensorInfo(dtype, shape, data + start, data + end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found
