"""The schedule file: which job, when, and what becomes of missed and overlapping runs. Read strictly; light."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from cluster.errors import InputError
from cluster.strict import plain_text
from cluster.yaml_files import load_yaml, read_text
from jobs.absolute import absolute_paths
from jobs.job import Job, explain, read_job
from workflows.recipe import DataSource, Name, Strict

Missed = Literal["skip", "once", "all"]
EXAMPLE = "See jobs/examples/schedule.yaml for one."


def known_cron(value: str) -> str:
    """The expression, if it is one of five fields that ever comes true."""
    if len(value.split()) != 5:  # cronsim would take seconds as well; cron and Kubernetes do not
        raise ValueError("a cron expression has five fields: minute hour day-of-month month day-of-week")
    try:
        next(CronSim(value, datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        raise ValueError(f"no cron expression: {error}") from error
    except StopIteration as error:
        raise ValueError("this moment never comes") from error
    return value


Cron = Annotated[str, Field(max_length=200), AfterValidator(known_cron)]


class GateCheck(Strict):
    """When the published model is held against its gates again, and on which data."""

    data: DataSource = Field(description="Fresh text; the latest release and the dense model are both judged on it.")
    check: Cron = Field(description="Cron expression of the checks, in the schedule's time zone.")


class Schedule(Strict):
    """A job that starts by itself."""

    name: Name = Field(description="The schedule's name, unique in its store.")
    job: Job = Field(description="A job file's path, relative to this file, or the job itself.")
    cron: Cron | None = Field(None, description='Five fields, such as "0 3 * * 1".')
    timezone: str = Field("UTC", max_length=100, description="IANA time zone of all cron expressions here.")
    when_model_changes: bool = Field(False, description="Start when the job's model has a new digest.")
    when_gate_fails: GateCheck | None = Field(
        None, description="Start when the latest release fails the job's gates on fresh data."
    )
    missed: Missed = Field(
        "once",
        description="Moments at which nothing could start (downtime): skip them, make up for all of them once, or all.",
    )
    overlap: Literal["skip", "queue"] = Field(
        "skip", description="While a run of this schedule is alive: start nothing, or start when it has ended."
    )
    paused: bool | None = Field(None, description="Set at `apply`; left out, what pause and resume did stays.")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (LookupError, ValueError, OSError) as error:
            raise ValueError("no IANA time zone; write one such as Europe/Berlin") from error
        return value

    @model_validator(mode="after")
    def _has_a_trigger(self) -> Self:
        if not (self.cron or self.when_model_changes or self.when_gate_fails):
            raise ValueError("nothing would ever start it: give cron, when_model_changes or when_gate_fails")
        if self.job.publish.version != "auto":
            raise ValueError("job.publish.version: a schedule publishes again and again; it must be auto")
        return self


def read_schedule(path: Path) -> Schedule:
    """Reads and validates a schedule file, and the job file that it may name.

    Raises:
        InputError: a file is missing, too large, no YAML, or a field is wrong; names the file and field.
    """
    content = load_yaml(read_text(path, "a schedule file"), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: a schedule is a mapping of fields, this is a {type(content).__name__}", EXAMPLE)
    return schedule_of(content, path)


def schedule_of(content: Mapping[str, Any], path: Path) -> Schedule:
    """The schedule in plain data; `path` names it in errors and is where a job's relative path starts."""
    job = content.get("job")
    try:
        if isinstance(job, str):
            job = _named_job(job, path)
        elif isinstance(job, dict):
            job = Job.model_validate(job)
    except ValidationError as error:
        raise InputError(explain(error, f"{path}: job"), "`karikomi fields` lists every field of a job.") from error
    try:
        schedule = Schedule.model_validate({**content, "job": job} if "job" in content else content)
    except ValidationError as error:
        raise InputError(explain(error, str(path), Schedule), EXAMPLE) from error
    try:
        return schedule.model_copy(update={"job": absolute_paths(schedule.job)[0]})
    except InputError as error:
        raise InputError(f"{path}: job.publish.to: {error.message}", error.hint) from error


def _named_job(name: str, path: Path) -> Job:
    try:
        return read_job(path.parent / plain_text(name))
    except (InputError, ValueError) as error:
        message = error.message if isinstance(error, InputError) else str(error)
        hint = (error.hint if isinstance(error, InputError) else "") or EXAMPLE
        raise InputError(f"{path}: job: {message}", hint) from error
