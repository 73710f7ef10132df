"""Archives of zeros give back every bit, and damaged ones say what is wrong."""

import hashlib
import json
import struct
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows.formats.compact import METADATA_KEY, pack, pack_bytes, unpack, unpack_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(INTEGERS[tensor.itemsize])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


@st.composite
def sparse_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Random bits (NaN payloads, infinities, denormals), zeros and negative zeros; scalar to 3-d; empty."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(0, 256, [*shape, dtype.itemsize], generator=generator, dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    zeros = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    tensor = tensor.masked_fill(zeros, 0.0)
    negative = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2]))
    return tensor.masked_fill(negative, -0.0)


def file_with_zeros() -> bytes:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 48, generator=generator)
    weight[torch.rand(32, 48, generator=generator) < 0.6] = 0
    tensors = {
        "a.weight": weight.bfloat16(),
        "b.weight": weight.clone(),
        "norm": torch.ones(48),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
        "ids": torch.arange(5),
    }
    return safetensors.torch.save(tensors, {"format": "pt"})


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.text(max_size=8), sparse_tensors(), max_size=4))
def test_tensors_come_back_bit_for_bit(tensors: dict[str, torch.Tensor]) -> None:
    restored = unpack(*pack(tensors))
    assert restored.keys() == tensors.keys()
    assert all(same(restored[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        sparse_tensors(),
        max_size=4,
    ),
    st.one_of(st.none(), st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=2)),
)
def test_files_come_back_byte_for_byte(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    data = safetensors.torch.save(tensors, metadata)
    assert unpack_bytes(pack_bytes(data)) == data


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_other_types_come_back_too(dtype: torch.dtype) -> None:
    values = torch.zeros(10, 10)
    values[::4] = 1
    data = safetensors.torch.save({"x": values.to(dtype)})
    assert unpack_bytes(pack_bytes(data)) == data


def test_files_in_another_order_or_with_odd_padding_come_back() -> None:
    """Files that other programs wrote: the header is kept word for word, not written anew."""
    header = json.dumps(
        {
            "late": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]},
            "early": {"dtype": "BF16", "shape": [2], "data_offsets": [256, 260]},
            "__metadata__": {"ü": "naïve"},
        },
        indent=1,
        ensure_ascii=False,
    )
    encoded = (header + "   ").encode()
    encoded += b" " * (-len(encoded) % 8)
    data = struct.pack("<Q", len(encoded)) + encoded + bytes(252) + b"\x00\x00\x00\x80" + b"\x01\x02\x03\x04"
    archive = pack_bytes(data)
    assert "values:late" in safetensors.torch.load(archive)
    assert unpack_bytes(archive) == data


def test_sizes_are_what_the_format_promises() -> None:
    weight = torch.zeros(64, 64, dtype=torch.bfloat16)
    weight[:, ::2] = -0.0
    archive, shapes = pack(
        {
            "half": weight,
            "dense": torch.ones(64, 64),
            "mostly": torch.ones(32).index_fill(0, torch.tensor([0]), 0),
        }
    )
    assert shapes == {"half": [64, 64]}
    assert archive["mask:half"].nbytes == 64 * 64 // 8
    assert archive["values:half"].nbytes == 64 * 32 * 2
    assert {"dense:dense", "dense:mostly", "mask:half", "values:half"} == archive.keys()


def test_archive_is_smaller_and_the_same_bytes_each_time() -> None:
    data = file_with_zeros()
    archive = pack_bytes(data)
    assert len(archive) < 0.65 * len(data)
    assert pack_bytes(data) == archive
    assert hashlib.sha256(unpack_bytes(archive)).digest() == hashlib.sha256(data).digest()


def test_names_cannot_collide() -> None:
    zeros = torch.zeros(100)
    tensors = {"x": zeros, "mask:x": zeros, "values:x": torch.ones(3), "dense:x": torch.ones(2)}
    restored = unpack(*pack(tensors))
    assert all(same(restored[name], tensor) for name, tensor in tensors.items())


def test_truncation_anywhere_is_an_error() -> None:
    archive = pack_bytes(file_with_zeros())
    for length in [*range(0, 24), *range(24, len(archive), 97), len(archive) - 1]:
        with pytest.raises(ValueError, match="not a"):
            unpack_bytes(archive[:length])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        unpack_bytes(archive + b"\x00")


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"\xff" * 64, b"PK\x03\x04" + bytes(100)])
def test_what_is_no_safetensors_file_is_refused(data: bytes) -> None:
    for read in (pack_bytes, unpack_bytes):
        with pytest.raises(ValueError, match="not a"):
            read(data)


def test_a_plain_safetensors_file_is_no_archive() -> None:
    with pytest.raises(ValueError, match="not a compact archive"):
        unpack_bytes(file_with_zeros())


def damaged(change: Any) -> bytes:
    """An archive of one packed tensor "w" and one stored "n", with tensors and description changed."""
    weight = torch.zeros(10, 10)
    weight[0, :3] = 1
    archive = pack_bytes(safetensors.torch.save({"w": weight, "n": torch.ones(4)}))
    length = struct.unpack("<Q", archive[:8])[0]
    description = json.loads(json.loads(archive[8 : 8 + length])["__metadata__"][METADATA_KEY])
    tensors = safetensors.torch.load(archive)
    change(tensors, description)
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(description)})


SIZES = {"n": 4, "w": 100}


def header_with(**entries: Any) -> str:
    offsets = {"n": [0, 16], "w": [16, 416]} | entries
    return json.dumps(
        {name: {"dtype": "F32", "shape": [SIZES.get(name, 1)], "data_offsets": at} for name, at in offsets.items()}
    )


def test_the_damage_below_starts_from_a_sound_archive() -> None:
    assert unpack_bytes(damaged(lambda tensors, description: None))
    assert unpack_bytes(damaged(lambda tensors, description: description.update(header=header_with())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: d["shapes"].update(w=[10**9, 10**9]), 'shape of tensor "w"'),
        (lambda t, d: d["shapes"].update(w=[2**40] * 1000), 'shape of tensor "w"'),
        (lambda t, d: d["shapes"].update(w=[10, 11]), 'shape of tensor "w"'),
        (lambda t, d: d["shapes"].update(w=[-10, -10]), 'shape of tensor "w"'),
        (lambda t, d: d["shapes"].update(w=[10.0, 10]), 'shape of tensor "w"'),
        (lambda t, d: d["shapes"].update(w=[True, 100]), 'shape of tensor "w"'),
        (lambda t, d: d["shapes"].update(w="100"), 'shape of tensor "w"'),
        (lambda t, d: d["shapes"].update(v=[8]), 'tensor "(mask|values):v" is missing'),
        (lambda t, d: d["shapes"].pop("w"), 'tensor "(mask|values):w" is not described'),
        (lambda t, d: t.pop("values:w"), 'tensor "values:w" is missing'),
        (lambda t, d: t.update({"dense:w": torch.ones(1)}), 'tensor "w" is there twice'),
        (lambda t, d: t.update({"other": torch.ones(1)}), 'tensor "other" is not described'),
        (lambda t, d: t.update({"dense:extra": torch.ones(1)}), 'tensor "extra" is not in the original'),
        (lambda t, d: t.pop("dense:n"), 'tensor "n" does not fit the original'),
        (lambda t, d: t.update({"values:w": torch.ones(4)}), 'tensor "w" has 4 values'),
        (lambda t, d: t.update({"values:w": torch.ones(1, 3)}), 'of tensor "w" are not lists'),
        (lambda t, d: t.update({"values:w": torch.ones(3).half()}), 'tensor "w" does not fit the original'),
        (lambda t, d: t.update({"mask:w": t["mask:w"].float()}), 'of tensor "w" are not lists'),
        (lambda t, d: t["mask:w"].__setitem__(0, 15), 'tensor "w" has 3 values'),
        (
            lambda t, d: (t["mask:w"].__setitem__(0, 3), t["mask:w"].__setitem__(12, 128)),
            'tensor "w" has 3 values',
        ),
        (lambda t, d: d.update(header=header_with(w=[17, 417])), 'tensor "w" does not fit the original'),
        (lambda t, d: d.update(header=header_with(w=[16, 10**15])), 'tensor "w" does not fit the original'),
        (lambda t, d: d.update(header=header_with(x=[416, 420])), 'tensor "x" does not fit the original'),
        (lambda t, d: d.update(header=header_with(w=[16, float("inf")])), "header is damaged"),
        (lambda t, d: d.update(header=header_with(w=None)), "header is damaged"),
        (lambda t, d: d.update(header="[1]"), "header is damaged"),
        (lambda t, d: d.update(header="[" * 100_000), "header is damaged"),
        (lambda t, d: d.update(header=7), "description is damaged"),
        (lambda t, d: d.update(shapes=[]), "description is damaged"),
        (lambda t, d: d.update(version=2), "version 1"),
        (lambda t, d: d.pop("header"), "version 1"),
    ],
)
def test_damage_is_named(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_bytes(damaged(change))
