"""doctor: what is wrong here, and what to do."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from jobs.commands.console import out, quiet_libraries, say

app = typer.Typer()
MARKS = {"ok": "[green]ok  [/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}


@app.command()
def doctor(
    store: Annotated[
        str | None,
        typer.Option("--from", envvar="KARIKOMI_STORE", help="A store to look at: s3://bucket/prefix or a directory."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="A cluster's job server to look at: http://HOST:8265."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at this machine, a store and a cluster, and say what to do about what is wrong.

    Nothing is changed; what is written into the store for the test is removed again. Ends by 0 when nothing failed,
    else by 1; warnings alone are no failure.
    """
    quiet_libraries()
    from jobs.doctor import examine, is_well

    findings = examine(store, cluster)
    if as_json:
        say(json.dumps([one.model_dump() for one in findings], indent=1))
    else:
        width = max(len(one.name) for one in findings)
        for one in findings:
            out.print(
                f"{MARKS[one.state]} {escape(one.name):{width}}  {escape(one.finding)}", highlight=False, soft_wrap=True
            )
            if one.advice:
                out.print(f"{'':{width + 6}} → {escape(one.advice)}", highlight=False, soft_wrap=True)
    if not is_well(findings):
        raise typer.Exit(1)
