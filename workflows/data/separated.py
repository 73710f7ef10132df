"""CSV and TSV files: a first line that names the columns, then one row per line, every cell a text."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv

from cluster.errors import InputError

LARGEST_FILE = 1 << 30  # bytes; the reader counts them in 32 bits
MOST_COLUMNS = 4096
SHOWN = 20  # columns in an error


def read_separated(content: bytes, address: str, columns: list[str]) -> list[dict[str, Any]]:
    """The rows of a file, with the columns asked for; cells are taken as they stand, also those that look like numbers.

    In CSV a cell may be quoted with ", and then hold commas and line breaks. In TSV nothing is quoted: a quotation mark
    is one, and neither tab nor line break can be in a cell.

    Args:
        content: the file, UTF-8.
        address: its name, for errors; its suffix says what separates cells.
        columns: names of columns.

    Raises:
        InputError: a column is missing or there twice, a row has too many or too few cells, or it is no UTF-8 text.
    """
    if len(content) > LARGEST_FILE:
        raise InputError(f"{address}: too much text; at most {LARGEST_FILE >> 30} GiB are read")
    tabs = Path(address).suffix.lower() == ".tsv"
    if content.partition(b"\n")[0].count(b"\t" if tabs else b",") >= MOST_COLUMNS:
        raise InputError(f"{address}: its first line names more than {MOST_COLUMNS} columns")
    try:
        table = pyarrow.csv.read_csv(
            pyarrow.py_buffer(content),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=max(len(content), 1)),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pyarrow.string()), strings_can_be_null=False
            ),
        )
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{address} is no readable {'TSV' if tabs else 'CSV'} file: {error}") from error
    names = table.column_names
    for column in columns:
        if names.count(column) != 1:
            found = "no column" if column not in names else "more than one column"
            raise InputError(f"{address}: {found} {column!r}; there are: {', '.join(names[:SHOWN])}")
    return list(table.select(columns).to_pylist())
