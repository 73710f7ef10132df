"""The command line. Imports torch and ray only inside the commands that need them, so help answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.errors import KarikomiError
from cluster.version import VERSION

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Makes a Transformer model smaller and faster: scores, prunes, repairs, measures, publishes.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 gate not met, 75 machines or store lost (retry), 130 stopped.",
)
WIDTH = 130  # of what is not a terminal: a log file wraps nothing
out = Console(width=None if sys.stdout.isatty() else WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file (YAML); see `karikomi fields`.")]


@app.command()
def run(job: JobFile) -> None:
    """Carry a job out, or go on where it was cut off.

    The same command again resumes: what is recorded in the store is never done twice. Ctrl-C stops after the piece
    of work at hand, a second Ctrl-C stops at once; nothing finished is lost.
    """
    from jobs.job import read_job
    from jobs.progress import Terminal
    from jobs.signals import draining

    order = read_job(job)
    quiet_libraries()
    from jobs.summary import print_outcome
    from workflows.compress import compress

    with draining() as drain, Terminal(err, len(order.recipe.stages)) as terminal:
        outcome = compress(order.recipe, order.settings, terminal, drain)
    print_outcome(outcome, order.settings, out)
    if not outcome.complete:
        raise typer.Exit(3)


@app.command()
def plan(job: JobFile) -> None:
    """Say what a run would do, before anything runs.

    Stages, steps that are done already, memory per worker, workers and GPUs, and where it will publish.
    """
    from jobs.job import read_job

    order = read_job(job)
    quiet_libraries()
    from jobs.planning import sentences

    for line in sentences(order):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def pull(
    release: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A release; the latest if no version.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty directory to put it in.")],
    store: Annotated[
        str,
        typer.Option("--from", envvar="KARIKOMI_STORE", help="The store: s3://bucket/prefix or a directory."),
    ],
) -> None:
    """Fetch a release and verify every digest; a compact one is unpacked."""
    from jobs.pulling import pull_release

    pulled = pull_release(store, release, directory)
    out.print(
        f"{pulled.name}@{pulled.version} is in {directory}, all {len(pulled.files)} files verified",
        highlight=False,
    )


@app.command()
def fields() -> None:
    """List every field of a job file, its default and what it means."""
    from jobs.fields import field_table

    out.print(field_table())


@app.command()
def version() -> None:
    """Print the version."""
    out.print(VERSION)


def quiet_libraries() -> None:
    """Keeps the terminal for the run's own progress; set before the libraries are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def main() -> None:
    """Entry point: errors become one clear message and the exit code of the contract."""
    try:
        app()
    except KarikomiError as error:
        err.print(f"[red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)
        if error.hint:
            err.print(escape(error.hint), highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


def escape(text: str) -> str:
    """User text with rich's markup taken literally."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


if __name__ == "__main__":
    main()
