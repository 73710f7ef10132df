"""Text, JSONL and Parquet files that lie, burst, or are something else."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hostile.cases import Case, file, pickled_bomb

from workflows.data.sources import read_documents
from workflows.recipe import DataSource


def data(name: str, filename: str, content: bytes | str | Callable[[], bytes], *mentions: str, **fields: Any) -> Case:
    """A data file of this content, read as evaluation text."""

    def build(folder: Path) -> DataSource:
        path = file(folder, filename, content() if callable(content) else content)
        return DataSource(source=str(path), **fields)

    return Case(
        name, build, lambda source: read_documents(source, "evaluation"), ("data.evaluation", filename, *mentions)
    )


def table(columns: dict[str, Any], **how: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, **how)
    return buffer.getvalue()


def parquet(name: str, columns: Callable[[], dict[str, Any]], *mentions: str, **fields: Any) -> Case:
    return data(name, "a.parquet", lambda: table(columns()), *mentions, **fields)


def harmed(change: Callable[[bytearray], Any]) -> Callable[[], bytes]:
    """A good Parquet file with some bytes changed."""

    def make() -> bytes:
        content = bytearray(table({"text": [f"some text {i}" for i in range(1000)]}))
        changed = change(content)
        return bytes(content if changed is None else changed)

    return make


def patch(start: int, new: bytes) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        at = start % len(content)
        content[at : at + len(new)] = new

    return change


def repeated(rows: int, text: str) -> Callable[[], dict[str, Any]]:
    """A column that is tiny on disk: one word of a dictionary, many times."""
    return lambda: {"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), [text])}


def at(address: str) -> Case:
    """A data source by its address."""
    return Case(f"the source is {address[:30]!r}", lambda folder: DataSource(source=address), lambda source: read_documents(source, "tuning"), ("data.tuning", *([] if "s3:" in address else [address[:20]])))  # fmt: skip


GOOD = b'{"text": "one"}\n'
CASES = [
    data("a pickle that is called TSV", "a.tsv", pickled_bomb()),
    data("a CSV whose quotation mark stays open", "a.csv", b'text,kind\n"a,b\n' + b"c,d\n" * 1000),
    data("a row with a cell too many", "a.tsv", b"text\tkind\na\tb\tc\n"),
    data("a million columns", "a.csv", lambda: b",".join([b"c"] * 1_000_000) + b"\n", "columns"),
    data("a column that steers the terminal", "a.tsv", b"\x1b[2J\tkind\nx\ty\n", "'text'"),
    data("a TSV that is no UTF-8", "a.tsv", b"text\tkind\n\xff\ty\n"),
    data("a TSV of NULs", "a.tsv", b"\0" * 100),
    data("a label that is a list", "a.jsonl", b'{"text": "a", "label": [1]}', "line 1", "'label'", label="label"),
    data("JSON that is none", "a.jsonl", GOOD * 6 + b"{\n" + GOOD, "line 7"),
    data("a line that is a list", "a.jsonl", GOOD + b'["text"]\n', "line 2"),
    data("a line that is text", "a.jsonl", b'"text"', "line 1"),
    data("a line nested deep", "a.jsonl", GOOD + b'{"text":' * 100_000, "line 2"),
    data("a line of lists nested deep", "a.jsonl", GOOD + b"[" * 1_000_000, "line 2"),
    data("a line of 50 MB", "a.jsonl", lambda: GOOD + b'{"text": "' + b"a" * (50 << 20), "line 2"),
    data("a number of a million digits", "a.jsonl", b'{"text": ' + b"9" * 1_000_000 + b"}", "line 1"),
    data("text that is a number", "a.jsonl", b'{"text": 5}', "line 1", "'text'"),
    data("text that is null", "a.jsonl", b'{"text": null}', "line 1", "'text'"),
    data("text that is a list", "a.jsonl", b'{"text": ["a"]}', "line 1", "'text'"),
    data("text that is a map", "a.jsonl", b'{"text": {"a": "b"}}', "line 1", "'text'"),
    data("text under another name", "a.jsonl", b'{"body": "a"}', "line 1", "'text'"),
    data("text under a name that steers the terminal", "a.jsonl", b'{"\\u001b[2J": "a"}', "line 1", "'text'"),
    data("half a surrogate pair", "a.jsonl", GOOD + b'{"text": "a\\ud800b"}', "line 2", "'text'"),
    data("half a surrogate pair in a slice", "a.jsonl", b'{"text": "a", "kind": "\\udfff"}', "line 1", "'kind'", slice="kind"),
    data("a slice that is a number", "a.jsonl", b'{"text": "a", "kind": 1}', "line 1", "'kind'", slice="kind"),
    data("no slice", "a.jsonl", b'{"text": "a"}', "line 1", "'kind'", slice="kind"),
    data("latin-1", "a.jsonl", b'{"text": "\xe9"}', "UTF-8"),
    data("UTF-16", "a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-8"),
    data("a pickle as JSONL", "a.jsonl", pickled_bomb(), "UTF-8"),
    data("empty JSONL", "a.jsonl", b"", "no text"),
    data("JSONL of blank lines", "a.jsonl", b"\n \n" * 1000, "no text"),
    data("JSONL of blank texts", "a.jsonl", b'{"text": "  "}\n' * 1000, "no text"),
    data("NaN for text", "a.jsonl", b'{"text": NaN}', "line 1"),
    data("text that is no UTF-8", "a.txt", bytes(range(256)), "UTF-8"),
    data("text of a pickle", "a.txt", pickled_bomb(), "UTF-8"),
    data("an empty text", "a.txt", b"", "no text"),
    data("a text of blanks", "a.txt", b" \n" * 1_000_000, "no text"),
    data("slices of a text", "a.txt", b"text", "slice", slice="kind"),
    data("a part that is empty", "a.txt", b"one\n\ntwo", "part [0.0, 0.1]", part=(0.0, 0.1)),
    data("an unknown ending", "a.pkl", pickled_bomb(), "what kind"),
    data("no ending", "a", b"text", "what kind"),
    data("a numpy file", "a.npy", pickled_bomb(), "what kind"),
    data("empty Parquet", "a.parquet", b"", "Parquet"),
    data("a pickle as Parquet", "a.parquet", pickled_bomb(), "Parquet"),
    data("only Parquet's magic", "a.parquet", b"PAR1PAR1", "Parquet"),
    data("Parquet of zeros", "a.parquet", b"PAR1" + bytes(1000) + b"PAR1", "Parquet"),
    *(data(f"{share:.0%} of a Parquet file", "a.parquet", harmed(lambda c, share=share: c[: int(len(c) * share)]), "Parquet") for share in (0.1, 0.5, 0.99)),
    data("a Parquet footer of 4 GB", "a.parquet", harmed(patch(-8, struct.pack("<I", 0xFFFFFFFF))), "Parquet"),
    data("a Parquet footer longer than the file", "a.parquet", harmed(patch(-8, struct.pack("<I", 1 << 20))), "Parquet"),
    data("a Parquet footer of nonsense", "a.parquet", harmed(lambda c: c[:-300] + b"\xff" * 292 + c[-8:]), "Parquet"),
    data("Parquet pages of nonsense", "a.parquet", harmed(patch(20, b"\xff" * 200)), "Parquet"),
    data("a Parquet page header of nonsense", "a.parquet", harmed(patch(4, b"\x00" * 12)), "Parquet"),
    parquet("a missing column", lambda: {"body": ["a"]}, "'text'"),
    parquet("a missing slice", lambda: {"text": ["a"]}, "'kind'", slice="kind"),
    parquet("a column of numbers", lambda: {"text": [1, 2]}, "'text'"),
    parquet("a column of lists of text", lambda: {"text": [["a"]]}, "'text'"),
    parquet("a column of structs", lambda: {"text": [{"a": "b"}]}, "'text'"),
    parquet("a column of bytes", lambda: {"text": [b"a"]}, "'text'"),
    parquet("a column of bytes that are no UTF-8, told to be text", lambda: {"text": pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, pyarrow.py_buffer(struct.pack("<ii", 0, 2)), pyarrow.py_buffer(b"\xff\xfe")])}, "UTF8"),
    parquet("a column of dates", lambda: {"text": pyarrow.array([0], pyarrow.date32())}, "'text'"),
    parquet("text with a null", lambda: {"text": ["a", None, "b"]}, "row 2", "'text'"),
    parquet("a column of nulls", lambda: {"text": pyarrow.nulls(5)}, "'text'"),
    parquet("a slice of numbers", lambda: {"text": ["a"], "kind": [1]}, "'kind'", slice="kind"),
    parquet("no rows", lambda: {"text": pyarrow.array([], pyarrow.string())}, "no text"),
    parquet("the same column twice", lambda: pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"]), "text"),
    parquet("a nested name", lambda: {"text.a": ["a"], "x": [{"text": "b"}]}, "'text'"),
    parquet("20 GB of text in a few kB", repeated(20_000, "a" * 1_000_000), "too much text"),
    parquet("25 million rows in a few kB", lambda: {"text": pyarrow.DictionaryArray.from_arrays(pyarrow.Array.from_buffers(pyarrow.int32(), 25_000_000, [None, pyarrow.py_buffer(bytes(4 * 25_000_000))]), ["a"])}, "rows"),
    parquet("a thousand columns", lambda: {f"c{i}": ["a"] for i in range(1000)}, "'text'"),
    *map(at, (
        "/no/such/file.txt", "/etc.txt", "http://example.com/a.txt", "file:///etc/passwd.txt", "s3://a.txt", "s3://bucket/../x.txt", "~nobody-here/x.txt",
        "a" * 300 + ".txt", "builtin:evil", "builtin:../x.txt", "/dev/zero", "/proc/self/mem.txt", ".txt", "../../../../no/x.jsonl",
    )),
]  # fmt: skip
