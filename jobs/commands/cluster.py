"""submit, list, status, explain, logs, watch, cancel, resume, retry: runs on a cluster."""

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.commands.console import JobFile, StoreOption, err, out, quiet_libraries, say

if TYPE_CHECKING:
    from jobs.following import View
    from jobs.submission import Submission

app = typer.Typer()

ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Job server of a Ray cluster, http(s)://HOST:8265. It asks for the cluster's token: RAY_AUTH_TOKEN, "
        "RAY_AUTH_TOKEN_PATH (a file) or ~/.ray/auth_token. One token opens the whole cluster: it tells no tenants "
        "apart, the store's credentials do.",
        show_default="RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or the job's own",
    ),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or its unique beginning; see `list`.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command()
def submit(
    job: JobFile,
    cluster: ClusterOption = None,
    wait: Annotated[bool, typer.Option("--wait/--detach", help="Follow it to its end, with its exit code.")] = False,
    retries: Annotated[int, typer.Option(min=0, help="With --wait: tries again after lost machines.")] = 2,
    grace: Annotated[
        int | None, typer.Option(min=1, help="Seconds that a cancelled driver may take for the block at hand.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be submitted.")] = False,
) -> None:
    """Submit a job to a Ray cluster, and go on with other things.

    The package and the job travel along; the driver runs on a node of the cluster, off the head. The same job twice is
    one run: submitted again while it is on its way it is found, and when it is done nothing happens.
    """
    from jobs.absolute import absolute_paths
    from jobs.job import read_job

    order = read_job(job)
    quiet_libraries()
    from cluster.storage import open_store
    from jobs import submission
    from jobs.progress import Watching

    if dry_run:
        for line in submission.rehearse(order, cluster, grace):
            say(line)
        return
    done = submission.submit(order, cluster, grace, retries=retries if wait else 0)
    _say_all(done)
    store = absolute_paths(order)[0].publish.to
    if not wait:
        say(f"Follow it: karikomi watch {done.started.run} --from {store}")
        return
    with Watching(err) as watching:
        view = submission.watch(open_store(store), done.started.run, cluster, watching, retries)
    _finish(view)


@app.command("list")
def list_runs(store: StoreOption, as_json: AsJson = False) -> None:
    """List all runs of a store: state, progress, gate, age, release. Needs no cluster."""
    from cluster.storage import open_store
    from jobs.commands.views import json_of_all, table_of

    opened = open_store(store)
    if as_json:
        say(json_of_all(opened))
    else:
        out.print(table_of(opened))


@app.command()
def status(run: RunName, store: StoreOption, cluster: ClusterOption = None, as_json: AsJson = False) -> None:
    """Show a run and all its attempts; with the cluster's word when it is at hand."""
    from jobs.commands.views import json_of, lines_of

    view = _look(store, run, cluster)
    if as_json:
        say(json_of(view))
        return
    for line in lines_of(view):
        say(line)


@app.command()
def explain(run: RunName, store: StoreOption, cluster: ClusterOption = None) -> None:
    """Say in one sentence why a run waits or how it ended, and what to do next."""
    view = _look(store, run, cluster)
    explanation = view.explain()
    say(f"{view.run.run}: {explanation.sentence}")
    if explanation.hint:
        say(explanation.hint)


@app.command()
def logs(
    run: RunName,
    store: StoreOption,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    cluster: ClusterOption = None,
) -> None:
    """Print the log of a run's last attempt: from the cluster while it runs there, else from the store."""
    import sys

    from cluster.storage import open_store
    from jobs.following import find_run, jobs_of, log_lines

    opened = open_store(store)
    name = find_run(opened, run)
    for piece in log_lines(opened, name, jobs_of(opened, name, cluster), follow):
        sys.stdout.write(piece)
        sys.stdout.flush()


@app.command()
def watch(
    run: RunName,
    store: StoreOption,
    cluster: ClusterOption = None,
    retries: Annotated[int, typer.Option(min=0, help="Try again so often after lost machines.")] = 0,
) -> None:
    """Follow a run to its end and give its exit code; Ctrl-C leaves it running."""
    from cluster.storage import open_store
    from jobs import submission
    from jobs.following import find_run
    from jobs.progress import Watching

    opened = open_store(store)
    with Watching(err) as watching:
        view = submission.watch(opened, find_run(opened, run), cluster, watching, retries)
    _finish(view)


@app.command()
def cancel(
    run: RunName,
    store: StoreOption,
    cluster: ClusterOption = None,
    grace: Annotated[
        float | None, typer.Option(min=0, help="Seconds for the block at hand; at most what it was submitted with.")
    ] = None,
) -> None:
    """End a run: its block is finished and recorded, its machines are free when this returns."""
    from cluster.storage import open_store
    from jobs.cancelling import cancel as end
    from jobs.following import find_run

    opened = open_store(store)
    view = end(opened, find_run(opened, run), cluster, grace)
    explanation = view.explain()
    say(f"{view.last.started.attempt}: {explanation.sentence}; its machines are free again")
    say(explanation.hint)


@app.command()
def resume(run: RunName, store: StoreOption, cluster: ClusterOption = None) -> None:
    """Go on with a run that was cancelled or lost, at the last finished block."""
    from cluster.storage import open_store
    from jobs import submission
    from jobs.following import find_run

    opened = open_store(store)
    _say_all(submission.resume(opened, find_run(opened, run), cluster))


@app.command()
def retry(run: RunName, store: StoreOption, cluster: ClusterOption = None) -> None:
    """Try a run again, however it ended; what is finished is not done twice."""
    from cluster.storage import open_store
    from jobs import submission
    from jobs.following import find_run

    opened = open_store(store)
    _say_all(submission.retry(opened, find_run(opened, run), cluster))


def _look(store: str, run: str, cluster: str | None) -> "View":
    from cluster.storage import open_store
    from jobs.following import find_run, jobs_of, look

    opened = open_store(store)
    name = find_run(opened, run)
    return look(opened, name, jobs_of(opened, name, cluster))


def _say_all(done: "Submission") -> None:
    for line in done.sentences:
        say(line)


def _finish(view: "View") -> None:
    explanation = view.explain()
    say(f"{view.last.started.attempt}: {explanation.sentence}")
    if explanation.hint:
        say(explanation.hint)
    if view.code:
        raise typer.Exit(view.code)
