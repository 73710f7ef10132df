"""Where text comes from: text, JSONL and Parquet files, here or on S3, and the documentation that Python brings."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from cluster.errors import InputError
from cluster.storage import MissingKey, open_store
from workflows.data.separated import read_separated
from workflows.recipe import DataSource

BUILTIN = "builtin:python-docs"
MOST_ROWS = 20_000_000  # of a Parquet file
LARGEST_TEXT = 4 << 30  # bytes of a Parquet column, unpacked
STATEMENTS = {
    "assert", "assignment", "async", "augassign", "await", "break", "class", "compound", "continue", "del", "else",
    "for", "function", "global", "if", "import", "nonlocal", "pass", "raise", "return", "try", "while", "with", "yield",
}  # fmt: skip
TYPES = {
    "booleans", "dict", "floating", "integers", "imaginary", "lists", "numbers", "numeric-types", "sequence-types",
    "string-methods", "strings", "formatstrings", "truth",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A piece of text that belongs together, the slice it counts for, its label if it has one, and where it stands."""

    text: str
    slice: str
    label: str | int | None = None
    place: str = ""


def read_documents(source: DataSource, role: str) -> list[Document]:
    """The documents of a source's part.

    Parts are cut by document number, so that parts that do not overlap share no document: a paragraph of a text
    file, a line of JSONL, a row of Parquet.

    Args:
        source: what to read.
        role: "calibration", "tuning" or "evaluation"; named in errors.

    Raises:
        InputError: it cannot be read or has no text; names the field, the file and, where it can, the line.
    """
    try:
        if source.source == BUILTIN and source.label:
            raise InputError(f"{BUILTIN} has no labels", "Name a table of labelled texts.")
        documents = _python_docs() if source.source == BUILTIN else _reader(source)(_content(source.source), source)
    except InputError as error:
        raise InputError(f"data.{role}: {error.message}", error.hint) from error
    if not source.label:  # an empty text that has a label is wrong, and told later
        documents = [one for one in documents if one.text.strip()]
    if not documents:
        raise InputError(f"data.{role}: {source.source} holds no text")
    low, high = (int(share * len(documents)) for share in source.part)
    if low == high:
        raise InputError(
            f"data.{role}: part {list(source.part)} of the {len(documents)} documents of {source.source} is empty; "
            "make it wider"
        )
    return documents[low:high] if source.slice else [replace(one, slice="all") for one in documents[low:high]]


def fingerprint(source: DataSource) -> str:
    """sha256 of a source's whole content: a changed file is other data."""
    if source.source == BUILTIN:
        return hashlib.sha256("\0".join(one.text for one in _python_docs()).encode()).hexdigest()
    return hashlib.sha256(_content(source.source)).hexdigest()


def _content(address: str) -> bytes:
    folder, _, name = address.rpartition("/")
    try:
        if address.startswith("s3://"):
            return open_store(folder).get(name)
        path = Path(address).expanduser()
        if path.exists() and not path.is_file():
            raise InputError(f"{address} is no file")
        return path.read_bytes()
    except (MissingKey, FileNotFoundError) as error:
        raise InputError(f"{address} is not there") from error
    except OSError as error:
        raise InputError(f"{address} cannot be read: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:  # the home of nobody; a NUL
        raise InputError(f"{address} cannot be read: {error}") from error


def _reader(source: DataSource) -> Callable[[bytes, DataSource], list[Document]]:
    readers = {".txt": _text, ".jsonl": _jsonl, ".parquet": _parquet, ".csv": _separated, ".tsv": _separated}
    suffix = Path(source.source).suffix.lower()
    if suffix not in readers:
        raise InputError(f"{source.source}: what kind of file is it? Known: {', '.join(readers)}, and {BUILTIN}")
    return readers[suffix]


def _text(content: bytes, source: DataSource) -> list[Document]:
    for field, what in ((source.slice, "slice"), (source.label, "label")):
        if field:
            raise InputError(
                f"{source.source}: a text file has no column for {what}s",
                f"Leave `{what}` out, or use JSONL, Parquet, CSV or TSV.",
            )
    return [Document(paragraph, "all") for paragraph in _decoded(content, source.source).split("\n\n")]


def _jsonl(content: bytes, source: DataSource) -> list[Document]:
    documents = []
    for number, line in enumerate(_decoded(content, source.source).split("\n"), 1):  # U+2028 ends no line of JSON
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source.source}: line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{source.source}: line {number} is no JSON object")
        documents.append(_document(row, source, f"{source.source}: line {number}"))
    return documents


def _parquet(content: bytes, source: DataSource) -> list[Document]:
    """Rows of a Parquet file. What it unpacks to is told by its own footer and dictionaries before it is unpacked."""
    columns = list(dict.fromkeys(_columns(source)))
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(content))
        names = file.schema_arrow.names
        for column in columns:
            if names.count(column) != 1:
                found = "no column" if column not in names else "more than one column"
                raise InputError(f"{source.source}: {found} {column!r}; there are: {', '.join(names)}")
            kind = file.schema_arrow.field(column).type
            numbers = column == source.label and pyarrow.types.is_integer(kind)
            if not _is_text(kind) and not numbers:
                raise InputError(f"{source.source}: {column!r} holds {kind}, not text")
        if file.metadata.num_rows > MOST_ROWS:
            raise InputError(f"{source.source}: {file.metadata.num_rows} rows; at most {MOST_ROWS} are read")
        size = sum(_unpacked(file, column) for column in columns)
        packed = pyarrow.parquet.ParquetFile(io.BytesIO(content), metadata=file.metadata, read_dictionary=columns)
        table = packed.read(columns=columns) if size <= LARGEST_TEXT else None
        if table is None or sum(_expanded(table[column]) for column in columns) > LARGEST_TEXT:
            raise InputError(f"{source.source}: too much text; at most {LARGEST_TEXT >> 30} GiB are read")
        table.validate(full=True)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source.source} is no readable Parquet file: {error}") from error
    return [_document(row, source, f"{source.source}: row {number}") for number, row in enumerate(rows, 1)]


def _document(row: dict[str, Any], source: DataSource, place: str) -> Document:
    """A row's text with its slice and label, after a look at each."""
    text = _cell(row, source.text, place)
    label = row.get(source.label) if source.label else None
    if source.label and type(label) is not int:
        label = _cell(row, source.label, place)
    return Document(text, _cell(row, source.slice, place) if source.slice else text, label, place)


def _separated(content: bytes, source: DataSource) -> list[Document]:
    """Rows of a CSV or TSV file, all of whose cells are text."""
    rows = read_separated(content, source.source, list(dict.fromkeys(_columns(source))))
    return [_document(row, source, f"{source.source}: row {number}") for number, row in enumerate(rows, 1)]


def _is_text(kind: pyarrow.DataType) -> bool:
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return bool(pyarrow.types.is_string(plain) or pyarrow.types.is_large_string(plain))


def _unpacked(file: pyarrow.parquet.ParquetFile, column: str) -> int:
    """Bytes of a column's pages once they are unpacked, as the footer tells."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)


def _expanded(column: pyarrow.ChunkedArray) -> int:
    """Bytes of a column once every row has its own text, or number."""
    if pyarrow.types.is_integer(column.type):
        return int(column.nbytes)
    lengths = pyarrow.compute.binary_length
    total = 0
    for chunk in column.chunks:
        if isinstance(chunk, pyarrow.DictionaryArray):
            each = lengths(chunk.dictionary).take(chunk.indices)
        else:
            each = lengths(chunk)
        total += pyarrow.compute.sum(each.cast(pyarrow.int64())).as_py() or 0
    return total


def _columns(source: DataSource) -> list[str]:
    """The columns that are read: the text's, the slice's and the label's."""
    return [column for column in (source.text, source.slice, source.label) if column]


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise InputError(f"{where}: no field {column!r}; there are: {', '.join(map(str, row))}")
    value = row[column]
    if not isinstance(value, str):
        raise InputError(f"{where}: {column!r} holds a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, and no text
        raise InputError(f"{where}: {column!r} holds half a character: {error.reason}") from error
    return value


def _decoded(content: bytes, address: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{address} is no UTF-8 text: byte {error.start}") from error


def _python_docs() -> list[Document]:
    """The paragraphs of pydoc's topics, each once, by topic; slices: statements, types, language.

    Topics quote each other, so a paragraph counts where it comes first: parts of this source share no text.
    They come in the order of their names' digests, which mixes the slices over all parts.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for topic in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        kind = (
            "statements"
            if topic in STATEMENTS
            else "types"
            if topic in TYPES or topic.startswith("types")
            else "language"
        )
        for paragraph in topics[topic].split("\n\n"):
            if paragraph.strip() and paragraph not in seen:
                seen.add(paragraph)
                documents.append(Document(paragraph, kind))
    return documents
