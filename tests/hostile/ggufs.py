"""GGUF files that are none, or whose numbers burst a reader."""

import struct
from collections.abc import Callable
from pathlib import Path

from hostile.cases import Case, bomb_module, file, pickled_bomb

from workflows.models.source import resolve_source

HUGE = (1 << 62) + 5


def header(tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def value(key: bytes, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


def tensor(name: bytes = b"t", sizes: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def gguf(name: str, content: bytes, *mentions: str, before: Callable[[Path], object] = lambda folder: None) -> Case:
    """A .gguf file of this content."""

    def build(folder: Path) -> Path:
        before(folder)
        return file(folder, "m.gguf", content)

    return Case(
        name, build, lambda path: resolve_source(str(path), path.parent / "cache"), ("model", "m.gguf", *mentions)
    )


def with_code(folder: Path) -> None:
    """Code beside the file, and configs that ask for it."""
    for name in ("config.json", "tokenizer_config.json"):
        file(
            folder,
            name,
            '{"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", null]}}',
        )
    file(folder, "evil.py", bomb_module())


LLAMA = value(b"general.architecture", 8, text(b"llama"))
CASES = [
    gguf("nothing", b"", "no GGUF"),
    gguf("three bytes", b"GGU", "no GGUF"),
    gguf("another magic", b"GGML" + bytes(100), "no GGUF"),
    gguf("a pickle", pickled_bomb(), "no GGUF"),
    gguf("only the magic", b"GGUF"),
    gguf("an unknown version", header(version=99)),
    gguf("no values at all", header()),
    gguf("2^62 tensors", header(tensors=HUGE) + bytes(1000)),
    gguf("2^62 values", header(values=HUGE) + bytes(1000)),
    gguf("a key of 4 GiB in a kB", header(values=1) + text(b"general", 4 << 30) + bytes(1000)),
    gguf("a text of 2^62 bytes", header(values=1) + value(b"general.architecture", 8, text(b"llama", HUGE))),
    gguf("a list of 2^62 numbers", header(values=1) + value(b"x", 9, struct.pack("<IQ", 4, HUGE)) + bytes(1000)),
    gguf("a list of 2^62 texts", header(values=1) + value(b"x", 9, struct.pack("<IQ", 8, HUGE)) + bytes(1000)),
    gguf("lists in lists", header(values=1) + text(b"x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    gguf("an unknown kind of value", header(values=1) + value(b"x", 77, bytes(8))),
    gguf("a key that is no UTF-8", header(values=1) + value(b"\xff\xfe", 4, bytes(4))),
    gguf("a key twice", header(values=2) + LLAMA + LLAMA),
    gguf("an unknown architecture", header(values=1) + value(b"general.architecture", 8, text(b"evil"))),
    gguf("an architecture that is a number", header(values=1) + value(b"general.architecture", 4, bytes(4))),
    gguf("no tensors", header(values=1) + LLAMA),
    gguf("an unknown quantisation", header(tensors=1, values=1) + LLAMA + tensor(kind=9999) + bytes(64)),
    gguf("a tensor of 2^62 numbers", header(tensors=1, values=1) + LLAMA + tensor(sizes=(HUGE,)) + bytes(64)),
    gguf("a tensor whose sizes overflow", header(tensors=1, values=1) + LLAMA + tensor(sizes=(1 << 33, 1 << 33)) + bytes(64)),
    gguf("a tensor of a million dimensions", header(tensors=1, values=1) + LLAMA + text(b"t") + struct.pack("<I", 1_000_000) + bytes(64)),
    gguf("a tensor beyond the file", header(tensors=1, values=1) + LLAMA + tensor(offset=1 << 40) + bytes(64)),
    gguf("cut short in a tensor's entry", header(tensors=5, values=1) + LLAMA + tensor()[:9]),
    gguf("code in configs beside it", header(values=1) + LLAMA, before=with_code),
]  # fmt: skip
