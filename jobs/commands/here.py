"""run, plan, fields, version: what needs no cluster but this machine."""

from enum import StrEnum
from typing import Annotated

import typer

from cluster.errors import KarikomiError
from cluster.version import VERSION
from jobs.commands.console import JobFile, err, out, quiet_libraries, say

app = typer.Typer()


class LogFormat(StrEnum):
    """How a run tells what it does."""

    console = "console"
    json = "json"


LogFormatOption = Annotated[
    LogFormat,
    typer.Option(
        "--log-format", envvar="KARIKOMI_LOG", help="console: for people; json: a line for each event, on stderr."
    ),
]


@app.command()
def run(job: JobFile, log_format: LogFormatOption = LogFormat.console) -> None:
    """Carry a job out, or go on where it was cut off.

    The same command again resumes: what is recorded in the store is never done twice. Ctrl-C stops after the piece
    of work at hand, a second Ctrl-C stops at once; nothing finished is lost.
    """
    from jobs.job import read_job
    from jobs.progress import Terminal
    from jobs.signals import draining

    order = read_job(job)
    quiet_libraries()
    from jobs.estimating import as_tenant
    from jobs.logs import configure, log_event, log_failure
    from jobs.records import asked_by
    from jobs.running import carry_out
    from jobs.summary import print_outcome

    configure(log_format.value)
    order = as_tenant(order, asked_by())
    if log_format is LogFormat.json:
        try:
            with draining() as drain:
                outcome = carry_out(order, log_event, drain)
        except KarikomiError as error:  # it is the log's last line already
            raise typer.Exit(error.exit_code) from error
        except Exception as error:
            log_failure()
            raise typer.Exit(1) from error
    else:
        with draining() as drain, Terminal(err, len(order.recipe.stages)) as terminal:
            outcome = carry_out(order, terminal, drain)
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
        say(line)


@app.command()
def fields() -> None:
    """List every field of a job file, its default and what it means."""
    from jobs.fields import field_table

    out.print(field_table())


@app.command()
def version() -> None:
    """Print the version."""
    out.print(VERSION)
