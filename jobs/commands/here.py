"""run, plan, fields, version: what needs no cluster but this machine."""

import typer

from cluster.version import VERSION
from jobs.commands.console import JobFile, err, out, quiet_libraries, say

app = typer.Typer()


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
    from jobs.running import carry_out
    from jobs.summary import print_outcome

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
