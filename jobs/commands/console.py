"""Where commands print, and what they share."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from cluster.errors import KarikomiError

WIDTH = 130  # of what is not a terminal: a log file wraps nothing
out = Console(width=None if sys.stdout.isatty() else WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file (YAML); see `karikomi fields`.")]
StoreOption = Annotated[
    str,
    typer.Option("--from", envvar="KARIKOMI_STORE", help="The store: s3://bucket/prefix or a directory."),
]


def say(line: str) -> None:
    """Prints a line as it is: nothing in it is markup, nothing is wrapped."""
    out.print(line, highlight=False, markup=False, soft_wrap=True)


def show_error(error: KarikomiError) -> None:
    """The cause, and the way out on a line of its own."""
    err.print(f"[red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
    if error.hint:
        err.print(escape(error.hint), highlight=False, soft_wrap=True)


def warn(error: KarikomiError) -> None:
    """Something that does not keep the command from the rest."""
    err.print(f"[yellow]warning:[/] {escape(error.message)}", highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keeps the terminal for the run's own progress; set before the libraries are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar in a log file is a thousand lines
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the driver's own; ranks choose theirs
