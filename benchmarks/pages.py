"""Figures in the pages: what a command measured stands between two marks, the words around it are a person's."""

from pathlib import Path

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def put(page: Path, figures: str) -> None:
    """Replaces what stands between a page's marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{figures}\n{END}{rest.partition(END)[2]}")
