"""Compact archives that do not fit together, as `pull` would unpack them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hostile.cases import Case, file, pickled_bomb

from workflows.formats.compact import METADATA_KEY, pack_bytes
from workflows.formats.huggingface import unpack_directory

NAME = "model-outer.safetensors"


def good() -> bytes:
    weight = torch.zeros(64, 32, dtype=torch.bfloat16)
    weight[::3] = 1.5
    return safetensors.torch.save({"w": weight, "norm": torch.ones(32)}, {"format": "pt"})


def archive(name: str, make: Callable[[], bytes], *mentions: str) -> Case:
    """A fetched compact release whose one weight file is this."""

    def build(folder: Path) -> Path:
        file(folder, NAME, make())
        return folder

    return Case(name, build, unpack_directory, (NAME, *mentions))


def parts() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and description of a good archive."""
    packed = pack_bytes(good())
    (length,) = struct.unpack("<Q", packed[:8])
    return dict(safetensors.torch.load(packed)), json.loads(
        json.loads(packed[8 : 8 + length])["__metadata__"][METADATA_KEY]
    )


def described(name: str, change: Callable[[dict[str, Any]], Any], *mentions: str) -> Case:
    """A good archive with another description."""

    def make() -> bytes:
        tensors, description = parts()
        changed = change(description)
        text = changed if isinstance(changed, str) else json.dumps(description)
        return safetensors.torch.save(tensors, {METADATA_KEY: text})

    return archive(name, make, *mentions)


def filled(name: str, change: Callable[[dict[str, torch.Tensor]], Any], *mentions: str) -> Case:
    """A good archive with other tensors."""

    def make() -> bytes:
        tensors, description = parts()
        change(tensors)
        return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(description)})

    return archive(name, make, *mentions)


def inner(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Changes the original file's header in the description."""

    def outer(description: dict[str, Any]) -> None:
        header = json.loads(description["header"])
        changed = change(header)
        description["header"] = changed if isinstance(changed, str) else json.dumps(header)

    return outer


def shape(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["shapes"].update(w=value)


def cut(share: float) -> Callable[[], bytes]:
    def make() -> bytes:
        packed = pack_bytes(good())
        return packed[: int(len(packed) * share)]

    return make


CASES = [
    archive("nothing", lambda: b""),
    archive("seven bytes", lambda: b"1234567"),
    archive("a pickle", pickled_bomb),
    archive("a header of 2^63 bytes", lambda: struct.pack("<Q", 1 << 63) + b"{}"),
    archive("a header of 2^64-1 bytes", lambda: b"\xff" * 8 + b"{}"),
    archive("a file of zeros", lambda: b"\0" * 1000),
    *(archive(f"{share:.0%} of an archive", cut(share)) for share in (0.01, 0.1, 0.5, 0.9, 0.999)),
    archive("more than an archive", lambda: pack_bytes(good()) + b"more"),
    archive("a plain file", good, "no description"),
    described("a description that is a list", lambda d: "[]", "archive"),
    described("a description that is no JSON", lambda d: "{", "archive"),
    described("a description nested deep", lambda d: "[" * 50_000, "archive"),
    described("a description that is null", lambda d: "null", "archive"),
    described("another version", lambda d: d.update(version=2), "version"),
    described("a version that is true", lambda d: d.update(version=True), "version"),
    described("an unknown field", lambda d: d.update(code="evil"), "version"),
    described("no shapes", lambda d: d.pop("shapes") and None, "version"),
    described("shapes that are a list", lambda d: d.update(shapes=[]), "damaged"),
    described("a header that is a map", lambda d: d.update(header={}), "damaged"),
    described("a shape of a tensor that is not there", lambda d: d["shapes"].update(ghost=[8]), "ghost"),
    described("a tensor without a shape", lambda d: d["shapes"].clear(), "w"),
    *(
        described(f"a shape of {what}", shape(value), '"w"')
        for what, value in {
            "terabytes": [1 << 20, 1 << 20], "2^64 elements": [1 << 32, 1 << 32], "1000-digit numbers": [int("9" * 1000)] * 100,
            "a million dimensions": [1] * 1_000_000, "text": "64x32", "null": None, "true": [True], "fractions": [64.0, 32.0],
            "negative sizes": [-64, -32], "zero": [0], "one element too few": [2047], "one byte too many": [2056],
            "a map": {"0": 64}, "nested lists": [[64, 32]],
        }.items()
    ),
    filled("a bitmask of another length", lambda t: t.update({"mask:w": torch.zeros(5, dtype=torch.uint8)}), '"w"'),
    filled("a bitmask of other counts", lambda t: t.update({"mask:w": torch.full((256,), 255, dtype=torch.uint8)}), '"w"'),
    filled("a bitmask of floats", lambda t: t.update({"mask:w": torch.zeros(256)}), '"w"'),
    filled("a bitmask of two dimensions", lambda t: t.update({"mask:w": torch.zeros(16, 16, dtype=torch.uint8)}), '"w"'),
    filled("a bitmask of one number", lambda t: t.update({"mask:w": torch.tensor(1, dtype=torch.uint8)}), '"w"'),
    filled("a value too few", lambda t: t.update({"values:w": t["values:w"][:-1].clone()}), '"w"'),
    filled("a value too many", lambda t: t.update({"values:w": torch.ones(2048, dtype=torch.bfloat16)}), '"w"'),
    filled("values of another type", lambda t: t.update({"values:w": t["values:w"].float()}), '"w"'),
    filled("values of complex numbers", lambda t: t.update({"values:w": t["values:w"].to(torch.complex64)}), '"w"'),
    filled("no values", lambda t: t.pop("values:w"), "values:w"),
    filled("no bitmask", lambda t: t.pop("mask:w"), "mask:w"),
    filled("a tensor both ways", lambda t: t.update({"dense:w": torch.zeros(64, 32, dtype=torch.bfloat16)}), '"w"'),
    filled("a tensor under no prefix", lambda t: t.update(x=torch.ones(1)), '"x"'),
    filled("a tensor of another name", lambda t: t.update({"dense:../../evil": torch.ones(1)}), "evil"),
    filled("a tensor too few", lambda t: t.pop("dense:norm"), "norm"),
    described("an original header that is a list", inner(lambda h: "[]"), "header"),
    described("an original header that is no JSON", inner(lambda h: "{"), "header"),
    described("an original header nested deep", inner(lambda h: "[" * 50_000), "header"),
    described("an original header with a name twice", inner(lambda h: json.dumps(h)[:-1] + ',"w":{"dtype":"BF16","shape":[64,32],"data_offsets":[0,4096]}}'), "header"),
    described("an original header of other offsets", inner(lambda h: h["w"].update(data_offsets=[1, 4097])), '"w"'),
    described("an original header of huge offsets", inner(lambda h: h["w"].update(data_offsets=[0, 1 << 62])), '"'),
    described("an original header of negative offsets", inner(lambda h: h["w"].update(data_offsets=[-4096, 0])), '"'),
    described("an original header of another shape", inner(lambda h: h["w"].update(shape=[64, 33])), "'w'"),
    described("an original header of another type", inner(lambda h: h["w"].update(dtype="F32")), "'w'"),
    described("an original header of an unknown type", inner(lambda h: h["w"].update(dtype="OBJ")), "'w'"),
    described("an original header without a tensor", inner(lambda h: h.pop("w") and None), '"'),
    described("an original header with a tensor too many", inner(lambda h: h.update(z={"dtype": "U8", "shape": [0], "data_offsets": [4224, 4224]})), '"z"'),
]  # fmt: skip
