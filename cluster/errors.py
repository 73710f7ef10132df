"""Errors that end a command, each with the exit code of the contract.

0 done, 1 failed, 2 bad input (never retried), 3 gate not met, 75 lost machines or store (retry), 130 cancelled.
"""

LONGEST_MESSAGE = 4000  # characters


def printable(text: str) -> str:
    """Text that is safe to show and to log: foreign names in it cannot steer a terminal or flood a record."""
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]} …"
    return "".join(one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)


class KarikomiError(Exception):
    """A failure that a user can read: what happened, and the way out.

    Args:
        message: the cause, naming the field, file or machine.
        hint: what to do or the command to run next; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = printable(message)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class InputError(KarikomiError):
    """The user's file, field or model cannot be used; retrying changes nothing."""

    exit_code = 2


class GateNotMet(KarikomiError):
    """The compressed model is not good enough, and no earlier stage was."""

    exit_code = 3


class Unavailable(KarikomiError):
    """Machines or the store were lost or are out of reach; the same command later goes on."""

    exit_code = 75


class Cancelled(KarikomiError):
    """The user asked to stop; everything finished so far is recorded."""

    exit_code = 130
