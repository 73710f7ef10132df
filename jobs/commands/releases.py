"""pull: what has been published."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.commands.console import StoreOption, out

app = typer.Typer()


@app.command()
def pull(
    release: Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="A release; the latest if no version.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty directory to put it in.")],
    store: StoreOption,
) -> None:
    """Fetch a release and verify every digest; a compact one is unpacked."""
    from jobs.pulling import pull_release

    pulled = pull_release(store, release, directory)
    out.print(
        f"{pulled.name}@{pulled.version} is in {directory}, all {len(pulled.files)} files verified",
        highlight=False,
    )
