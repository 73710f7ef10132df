"""One line of a doctor's report."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

State = Literal["ok", "warn", "fail"]


class Finding(BaseModel):
    """What was looked at, how it is, and what to do."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: State
    finding: str
    advice: str = ""


def ok(name: str, finding: str) -> Finding:
    """All is well."""
    return Finding(name=name, state="ok", finding=finding)


def warn(name: str, finding: str, advice: str) -> Finding:
    """Runs work, but slower, or less safely."""
    return Finding(name=name, state="warn", finding=finding, advice=advice)


def fail(name: str, finding: str, advice: str) -> Finding:
    """Some run will fail by it."""
    return Finding(name=name, state="fail", finding=finding, advice=advice)
