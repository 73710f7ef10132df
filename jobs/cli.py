"""The command line. Help answers at once: torch and ray are imported only inside the commands that need them."""

import sys

import typer

from cluster.errors import Cancelled, KarikomiError
from jobs.commands import accounts, cluster, doctor, here, observe, releases, schedule
from jobs.commands.console import show_error

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Makes a Transformer model smaller and faster: scores, prunes, repairs, measures, publishes.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 3 gate not met, 75 machines or store lost (retry), 130 stopped.",
)
for group in (here, cluster, releases, accounts, observe, doctor):
    app.add_typer(group.app)
app.add_typer(schedule.app, name="schedule")


def main() -> None:
    """Entry point: errors become one clear message and the exit code of the contract."""
    try:
        app()
    except KarikomiError as error:
        show_error(error)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if isinstance(ended.__context__, typer.Abort):  # Ctrl-C, which typer would end with 1
            sys.exit(Cancelled.exit_code)
        raise


if __name__ == "__main__":
    main()
