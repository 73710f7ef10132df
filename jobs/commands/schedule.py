"""karikomi schedule: jobs that start by themselves."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.commands.console import StoreOption, err, out, quiet_libraries, say

app = typer.Typer(
    no_args_is_help=True, help="Jobs that start by themselves: at times, or when a model changes or fails."
)

ScheduleName = Annotated[str, typer.Argument(metavar="NAME", help="A schedule's name.")]


@app.command()
def apply(file: Annotated[Path, typer.Argument(metavar="FILE", help="A schedule file (YAML).")]) -> None:
    """Put a schedule in force, or change it; the same file again changes nothing.

    It is kept in the store that its job publishes to, with the job as it is now: apply again when the job changes.
    """
    from datetime import UTC, datetime

    from cluster.storage import open_store
    from jobs.records import asked_by
    from jobs.schedules import read_schedule
    from jobs.scheduling import apply as put_in_force
    from jobs.scheduling import starts, under_rules
    from jobs.tenants import load_tenants

    schedule = under_rules(read_schedule(file), load_tenants())
    store = open_store(schedule.job.publish.to)
    applied, changed = put_in_force(store, schedule, datetime.now(UTC), asked_by())
    state = "is in force" if changed else "was in force already"
    say(f"{schedule.name} {state}{', paused' if applied.paused else ''}: {starts(schedule)}")
    say(f"Call this every few minutes: karikomi schedule run-due --from {schedule.job.publish.to}")


@app.command(name="list")
def list_(store: StoreOption) -> None:
    """List all schedules of a store: what starts them, when next, and what became of the last start."""
    from datetime import UTC, datetime

    from rich.table import Table

    from cluster.storage import open_store
    from jobs.scheduling import list_schedules

    table = Table("name", "job", "starts", "next (UTC)", "last", box=None, pad_edge=False)
    for one in list_schedules(open_store(store), datetime.now(UTC)):
        following = "paused" if one.paused else f"{one.next:%Y-%m-%d %H:%M}" if one.next else ""
        table.add_row(one.name, one.job, one.starts, following, one.last)
    out.print(table)


@app.command()
def pause(name: ScheduleName, store: StoreOption) -> None:
    """Start nothing any more until `resume`; a run that is under way goes on."""
    set_paused(name, store, True)
    say(f"{name} is paused; `karikomi schedule resume {name} --from {store}` ends that")


@app.command()
def resume(name: ScheduleName, store: StoreOption) -> None:
    """Go on with a paused schedule; what came due meanwhile is not made up for."""
    set_paused(name, store, False)
    say(f"{name} goes on")


@app.command(name="run-due")
def run_due_(
    store: StoreOption,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this schedule.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="http(s)://… submits the runs to that Ray cluster's job server and returns; another Ray address "
            "(auto, host:port) attaches to it from here. Without it each run goes where its job says, to its end."
        ),
    ] = None,
) -> None:
    """Start what is due. Call it every few minutes, from as many machines as you like: nothing starts twice.

    By cron: `*/5 * * * * karikomi schedule run-due --from STORE`. By systemd: a timer with `OnCalendar=*:0/5` and a
    service of `Type=oneshot`. It exits with 0 when all went well or nothing was due, else as the run that failed.
    """
    quiet_libraries()
    from cluster.storage import open_store
    from jobs.run_due import run_due
    from jobs.signals import draining
    from jobs.starting import edges_here

    codes = []
    with draining() as drain:
        for told in run_due(open_store(store), edges_here(cluster, err, drain), name):
            codes.append(told.code)
            say(f"{told.schedule} {told.fire} {told.what}: {told.sentence}")
    if not codes:
        say("nothing is due")
    raise typer.Exit(next((code for code in (1, 2, 75, 3, 130) if code in codes), 0))


@app.command()
def history(name: ScheduleName, store: StoreOption) -> None:
    """List a schedule's starts, newest first, and what became of each."""
    from rich.table import Table

    from cluster.storage import open_store
    from jobs.scheduling import history as read_history

    table = Table("due (UTC)", "trigger", "result", "run", "what", box=None, pad_edge=False)
    for fire, ended in read_history(open_store(store), name):
        result = ended.result if ended else "waits" if fire.waits else "started" if fire.attempts else "claimed"
        run = str(fire.attempts[-1]) if fire.attempts else ""
        missed = f" (and {fire.missed} missed)" if fire.missed and fire.runs else ""
        what = " – ".join(part for part in (ended.sentence if ended else "", fire.why) if part)
        table.add_row(f"{fire.due:%Y-%m-%d %H:%M}{missed}", fire.trigger, result, run, what)
    out.print(table)


@app.command()
def manifest(
    which: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A schedule in the store, or a schedule file.")],
    image: Annotated[str, typer.Option(help="Container image with karikomi in it.")],
    form: Annotated[
        Literal["raycronjob", "cronjob"],
        typer.Option(help="raycronjob: KubeRay's own, where its alpha gate is on; cronjob: works everywhere."),
    ] = "cronjob",
    namespace: Annotated[str, typer.Option(help="Kubernetes namespace.")] = "default",
    store: Annotated[
        str | None, typer.Option("--from", envvar="KARIKOMI_STORE", help="The store, when NAME is a schedule in it.")
    ] = None,
) -> None:
    """Write a schedule out as Kubernetes manifests, for `kubectl apply -f -`.

    They only call `run-due` in a Ray cluster that lives as long as the run; what runs is still decided by the records
    in the store. Apply the schedule as well.
    """
    from cluster.errors import InputError
    from cluster.storage import open_store
    from jobs.fires import read_applied
    from jobs.manifests import manifests
    from jobs.schedules import read_schedule

    if Path(which).suffix in (".yaml", ".yml"):
        schedule = read_schedule(Path(which))
    elif store:
        schedule = read_applied(open_store(store), which)[0].schedule
    else:
        raise InputError(f"{which}: in which store?", "Give --from STORE, or the path of a schedule file.")
    say(manifests(schedule, form, image, namespace).rstrip())


def set_paused(name: str, store: str, paused: bool) -> None:
    """Pauses or resumes, by whoever calls."""
    from datetime import UTC, datetime

    from cluster.storage import open_store
    from jobs.records import asked_by
    from jobs.scheduling import change

    change(open_store(store), name, datetime.now(UTC), asked_by(), paused)
