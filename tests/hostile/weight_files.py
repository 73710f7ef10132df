"""Files that call themselves safetensors, and indexes over them."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.cases import Case, copied_model, pickled_bomb

from cluster.paths import cache_directory
from workflows.models.source import resolve_source

NAME = "model.safetensors"
INDEX = "model.safetensors.index.json"
GIB = 1 << 30


def resolved(model: Path) -> object:
    return resolve_source(str(model), cache_directory())


def weights(name: str, content: Callable[[Path], bytes] | bytes, *mentions: str) -> Case:
    """A good model whose one weight file has another content, which may be made from the good one."""

    def build(folder: Path) -> Path:
        model = copied_model(folder)
        made = content if isinstance(content, bytes) else content(model / NAME)
        (model / NAME).write_bytes(made)
        return model

    return Case(name, build, resolved, mentions if "config.json" in mentions else (NAME, *mentions))


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def one(name: str, *mentions: str, data: bytes = b"1234", **entry: Any) -> Case:
    """A file of one tensor, which is described so."""
    return weights(name, header({"a": tensor(**entry)}, data), "tensor 'a'", *mentions)


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], bytes]:
    """The good file with another header, its data as they were."""

    def make(path: Path) -> bytes:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        return header(entries, content[8 + length :])

    return make


def renamed(before: str, after: str) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        entries[after] = entries.pop(before)

    return change


def reshaped(name: str, shape: list[int]) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        entries[name]["shape"] = shape

    return change


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickled_bomb())
    return buffer.getvalue()


def sparse(size: int, start: bytes) -> Callable[[Path], Path]:
    """A model whose weight file claims a size but takes no room on disk."""

    def build(folder: Path) -> Path:
        model = copied_model(folder)
        with (model / NAME).open("wb") as file:
            file.write(start)
            file.truncate(size)
        return model

    return build


def index(name: str, content: Any, *mentions: str) -> Case:
    """A good model with an index beside its weights; a dict is its weight_map, over the good one."""

    def build(folder: Path) -> Path:
        model = copied_model(folder)
        good = model / NAME
        (length,) = struct.unpack("<Q", good.read_bytes()[:8])
        names = [key for key in json.loads(good.read_bytes()[8 : 8 + length]) if key != "__metadata__"]
        made = content(names) if callable(content) else content
        (model / INDEX).write_text(made if isinstance(made, str) else json.dumps(made))
        return model

    return Case(name, build, resolved, (INDEX, *mentions))


def mapped(**changes: Any) -> Callable[[list[str]], Any]:
    return lambda names: {"weight_map": dict.fromkeys(names, NAME) | changes}


BLOCK = "model.layers.1.mlp.down_proj.weight"
CASES = [
    weights("a pickle", pickled_bomb(), "pickle"),
    weights("a pickle in a zip", zipped(), "pickle"),
    weights("a pickle behind a header's length", b"\x80\x04\0\0\0\0\0\0" + pickled_bomb(), NAME),
    weights("nothing", b"", "shorter"),
    weights("seven bytes", b"\0" * 7, "shorter"),
    weights("only a length", b"\0" * 8, NAME),
    weights("a header of 2^63 bytes", header({}, length=1 << 63), "claims"),
    weights("a header of 2^64-1 bytes", header({}, length=(1 << 64) - 1), "claims"),
    weights("a header one byte beyond the file", header({}, length=3), "claims"),
    weights("a header that is no JSON", header(b"\xff\xfe{}"), "JSON"),
    weights("a header that is a list", header([]), "JSON object"),
    weights("a header that is a number", header(b"5"), "JSON object"),
    weights("a header of NaN", header(b"NaN"), "JSON"),
    weights("a header nested 100 000 deep", header(b"[" * 100_000), "JSON"),
    weights("a header with maps nested deep", header(b'{"a":' * 50_000), "JSON"),
    weights("a tensor given twice", header(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"), "twice"),
    weights("a field given twice", header(b'{"a":{"dtype":"U8","dtype":"F32","shape":[4],"data_offsets":[0,4]}}', b"1234"), "twice"),
    weights("an entry that is a number", header({"a": 5}), "tensor 'a'"),
    weights("an entry that is null", header({"a": None}), "tensor 'a'"),
    weights("an empty entry", header({"a": {}}), "tensor 'a'"),
    one("an unknown field in an entry", "tensor", code="evil"),
    one("an unknown type", "OBJ", dtype="OBJ"),
    one("a type that is a list", dtype=["U8"]),
    one("a type that is null", dtype=None),
    one("a shape too large for its bytes", shape=[5]),
    one("a negative shape", shape=[-4], offsets=[0, 4]),
    one("two negative sizes", shape=[-2, -2]),
    one("a shape of fractions", shape=[4.0]),
    one("a shape of true", shape=[True], offsets=[0, 1], data=b"1"),
    one("a shape that is a word", shape="4"),
    one("a shape that is a map", shape={"4": 4}),
    one("a product beyond 64 bits", shape=[1 << 33, 1 << 33], offsets=[0, 4]),
    one("a product that is 4 modulo 2^64", shape=[(1 << 62) + 1, 4]),
    one("a size of 4000 digits", shape=[int("9" * 4000)]),
    one("sizes whose product takes ages", shape=[int("9" * 4000)] * 500),
    one("a million dimensions", shape=[1] * 1_000_000),
    one("a zero beside a huge size", shape=[0, 10**30], offsets=[0, 0], data=b""),
    one("negative offsets", offsets=[-4, 0]),
    one("offsets the wrong way round", offsets=[4, 0]),
    one("three offsets", offsets=[0, 4, 8]),
    one("offsets as text", offsets=["0", "4"]),
    weights("offsets of infinity", header({"a": tensor(offsets=[0, float("inf")])}, b"1234"), "Infinity"),
    one("a gap before the first tensor", offsets=[4, 8], data=b"12345678"),
    weights("a file longer than its tensors", header({"a": tensor()}, b"12345"), "its tensors end at"),
    weights("a file shorter than its tensors", header({"a": tensor()}, b"123"), "its tensors end at"),
    weights("tensors that overlap", header({"a": tensor(), "b": tensor(offsets=[2, 6])}, b"123456"), "overlap"),
    weights("two tensors of the same bytes", header({"a": tensor(), "b": tensor()}, b"1234"), "overlap"),
    weights("a name that steers the terminal", header({"\x1b[2J\x07": tensor(shape=[5])}, b"1234"), "tensor '\\x1b[2J"),
    weights("a name of a megabyte", header({"n" * 1_000_000: tensor(shape=[5])}, b"1234"), "tensor 'nnn"),
    weights("metadata that is no map", header({"__metadata__": 5, "a": tensor()}, b"1234"), "__metadata__"),
    weights("metadata of lists", header({"__metadata__": {"a": [1]}, "a": tensor()}, b"1234"), "__metadata__"),
    weights("only metadata", header({"__metadata__": {}}), "config.json", "0 blocks"),
    Case("a header of 100 MB", sparse(101 << 20, struct.pack("<Q", 100 << 20) + b"{"), resolved, (NAME, "claims")),
    Case("a file of a TiB with a tiny header", sparse(1 << 40, header({"a": tensor()})), resolved, (NAME, "its tensors end at")),
    Case("a file of a TiB that is all header", sparse(1 << 40, struct.pack("<Q", (1 << 40) - 8)), resolved, (NAME, "claims")),
    weights("a tensor missing", lambda path: edited(renamed(BLOCK, "model.layers.1.mlp.other.weight"))(path), "config.json", BLOCK),
    weights("a tensor of a block too many", lambda path: edited(renamed(BLOCK, "model.layers.2.mlp.down_proj.weight"))(path), "config.json", "model.layers.2"),
    weights("a block number of twenty digits", lambda path: edited(renamed(BLOCK, f"model.layers.{'9' * 20}.mlp.down_proj.weight"))(path), "config.json", BLOCK),
    weights("a block number with a zero before it", lambda path: edited(renamed(BLOCK, "model.layers.01.mlp.down_proj.weight"))(path), "config.json", BLOCK),
    weights("a matrix on its side", lambda path: edited(reshaped(BLOCK, [64, 32]))(path), BLOCK, "[64, 32]"),
    weights("a matrix as a row", lambda path: edited(reshaped(BLOCK, [2048]))(path), BLOCK, "[2048]"),
    weights("an embedding of another width", lambda path: edited(reshaped("model.embed_tokens.weight", [32, 259]))(path), "model.embed_tokens.weight"),
    weights("bytes for weights", lambda path: edited(lambda all: all[BLOCK].update(dtype="U8", shape=[32, 128]))(path), BLOCK, "[32, 128]"),
    weights("whole numbers for weights", lambda path: edited(lambda all: all[BLOCK].update(dtype="I16"))(path), BLOCK, "I16"),
    index("an index that is a list", "[]", "JSON object"),
    index("an index without a map", {"metadata": {}}, "weight_map"),
    index("a map that is a list", {"weight_map": [NAME]}, "weight_map"),
    index("a map to numbers", {"weight_map": {"a": 1}}, "weight_map"),
    index("a map that is empty", {"weight_map": {}}, "weight_map"),
    index("a shard further up", mapped(a="../model.safetensors"), "'../model.safetensors'"),
    index("a shard at an absolute path", mapped(a="/etc/passwd"), "'/etc/passwd'"),
    index("a shard in a folder", mapped(a="x/model.safetensors"), "'x/model.safetensors'"),
    index("a shard by a Windows path", mapped(a="..\\model.safetensors"), "shard"),
    index("a shard by an address", mapped(a="s3://bucket/model.safetensors"), "s3://bucket"),
    index("a shard that is a pickle", mapped(a="pytorch_model.bin"), "pytorch_model.bin"),
    index("a shard with a NUL", mapped(a="a\0.safetensors"), "shard"),
    index("a shard that is only its ending", mapped(a=".safetensors"), ".safetensors"),
    index("a shard that is not there", mapped(a="other.safetensors"), "other.safetensors, which is missing"),
    index("a tensor that is not there", mapped(ghost=NAME), "ghost"),
    index("a tensor too few", lambda names: {"weight_map": dict.fromkeys(names[1:], NAME)}, "tensor"),
    index("a tensor twice", '{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}', "twice"),
    index("a million tensors", lambda names: {"weight_map": {f"t{i}": NAME for i in range(500_000)}}, "too large"),
    index("an index nested deep", '{"weight_map": ' + "[" * 100_000, "JSON"),
    index("an index cut short", '{"weight_map": {"a": "mod', "JSON"),
]  # fmt: skip
