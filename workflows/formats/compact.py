"""The archive form for zeros: a bitmask and the values that are not zero, in a plain safetensors file.

"Zero" means that all bits are zero, so a negative zero is a value and survives. An archive keeps the header
of the file it was made from, word for word: unpacking gives that file back byte for byte, and its digest
verifies.
"""

import json
import math
import operator
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster.errors import InputError
from workflows.models.safetensors_header import read_header

# One key only: safetensors keeps no order among several, and an archive must be the same bytes each time.
METADATA_KEY = "karikomi.compact"
VERSION = 1
AS_STORED, MASK, VALUES = "dense:", "mask:", "values:"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Packs each tensor that gets smaller by it; the others stay as they are.

    Args:
        tensors: any types and shapes.

    Returns:
        Tensors of the archive: `dense:NAME` as it was, or `mask:NAME` (uint8 [⌈n/8⌉], first element in the
        lowest bit, 1 where a value is stored) with `values:NAME` (own type [non-zeros]). Then the shapes of
        those that were packed.
    """
    archive: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        flat = tensor.contiguous().reshape(-1)
        stored = flat.view(INTEGERS[flat.itemsize]) != 0
        packed_size = -(-len(flat) // 8) + int(stored.sum()) * flat.itemsize
        if packed_size < flat.nbytes:
            archive[MASK + name] = torch.from_numpy(np.packbits(stored.numpy(), bitorder="little"))
            archive[VALUES + name] = flat[stored]
            shapes[name] = list(tensor.shape)
        else:
            archive[AS_STORED + name] = tensor
    return archive, shapes


def unpack(archive: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The tensors that `pack` was given, bit for bit.

    Raises:
        ValueError: the archive does not fit together; the message names the tensor. Sizes are checked against
            the bitmask that is really there before anything is allocated.
    """
    kept = {key.removeprefix(AS_STORED): tensor for key, tensor in archive.items() if key.startswith(AS_STORED)}
    expected = {AS_STORED + name for name in kept} | {part + name for name in shapes for part in (MASK, VALUES)}
    for key in archive.keys() ^ expected:
        raise ValueError(f'compact archive: tensor "{key}" is {"not described" if key in archive else "missing"}')
    for name in kept.keys() & shapes.keys():
        raise ValueError(f'compact archive: tensor "{name}" is there twice')
    return kept | {
        name: _spread(name, archive[MASK + name], archive[VALUES + name], shape) for name, shape in shapes.items()
    }


def pack_bytes(data: bytes) -> bytes:
    """The archive of a safetensors file.

    Raises:
        ValueError: `data` is not a safetensors file.
    """
    tensors = _load(data)
    archive, shapes = pack(tensors)
    description = {"version": VERSION, "shapes": shapes, "header": _header(data)}
    return safetensors.torch.save(archive, {METADATA_KEY: json.dumps(description, sort_keys=True)})


def unpack_bytes(data: bytes) -> bytes:
    """The safetensors file that `pack_bytes` was given, byte for byte.

    Raises:
        ValueError: truncated, not an archive of ours, or parts that do not fit together.
    """
    description = _description(_header(data))
    tensors = unpack(_load(data), description["shapes"])
    header: str = description["header"]
    parts: list[bytes | memoryview] = [struct.pack("<Q", len(header.encode())), header.encode()]
    position = 0
    for name, start, stop in _layout(header):
        if name not in tensors or start != position or stop - start != tensors[name].nbytes:
            raise ValueError(f'compact archive: tensor "{name}" does not fit the original file\'s header')
        parts.append(tensors.pop(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        position = stop
    for name in tensors:
        raise ValueError(f'compact archive: tensor "{name}" is not in the original file\'s header')
    whole = b"".join(parts)
    try:
        read_header(lambda start, length: whole[start : start + length], len(whole))
    except InputError as error:  # digests speak for bytes, not for their sense
        raise ValueError(f"compact archive: the original file's header is damaged: {error.message}") from error
    return whole


def _spread(name: str, mask: Tensor, values: Tensor, shape: Any) -> Tensor:
    """One packed tensor in full."""
    if mask.dtype != torch.uint8 or mask.ndim != 1 or values.ndim != 1:
        raise ValueError(f'compact archive: bitmask and values of tensor "{name}" are not lists')
    limit = 8 * len(mask)
    sizes_fit = isinstance(shape, list) and all(type(size) is int and 0 < size <= limit for size in shape)
    if not sizes_fit or -(-(count := math.prod(shape)) // 8) != len(mask):
        raise ValueError(f'compact archive: shape of tensor "{name}" does not fit its bitmask')
    bits = np.unpackbits(mask.numpy(), bitorder="little")
    if bits[count:].any() or int(bits.sum(dtype=np.int64)) != len(values):
        raise ValueError(f'compact archive: tensor "{name}" has {len(values)} values, its bitmask tells otherwise')
    full = torch.zeros(count, dtype=values.dtype)
    as_integers = INTEGERS[values.itemsize]
    full.view(as_integers)[torch.from_numpy(bits[:count]).bool()] = values.view(as_integers)
    return full.reshape(shape)


def _load(data: bytes) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load(data))
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"not a whole safetensors file: {error}") from error


def _header(data: bytes) -> str:
    """A safetensors file's header: 8 bytes of length, little-endian, then this JSON (padded with spaces)."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 0 < length <= len(data) - 8:
        raise ValueError("not a whole safetensors file: its header is cut off")
    try:
        return data[8 : 8 + length].decode()
    except UnicodeDecodeError as error:
        raise ValueError("not a safetensors file: its header is not UTF-8") from error


def _description(header: str) -> dict[str, Any]:
    """What `pack_bytes` wrote down about the archive, its own fields checked."""
    try:
        description = json.loads(json.loads(header)["__metadata__"][METADATA_KEY])
        whole = set(description) == {"version", "shapes", "header"}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a compact archive: it has no description of one") from error
    if not whole or type(description["version"]) is not int or description["version"] != VERSION:
        raise ValueError(f"not a compact archive of version {VERSION}")
    if not isinstance(description["shapes"], dict) or not isinstance(description["header"], str):
        raise ValueError("compact archive: its description is damaged")
    return dict(description)


def _layout(header: str) -> list[tuple[str, int, int]]:
    """Name, start and end of each tensor's bytes, in the order of the file."""
    try:
        layout = []
        for name, info in json.loads(header).items():
            if name != "__metadata__":
                start, stop = info["data_offsets"]
                layout.append((name, operator.index(start), operator.index(stop)))
        return sorted(layout, key=lambda one: one[1:])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("compact archive: the original file's header is damaged") from error
