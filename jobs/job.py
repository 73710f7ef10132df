"""The job file: a recipe and who it is for. Read strictly; imports neither torch nor ray."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from cluster.errors import InputError
from cluster.spec import ClusterSpec
from cluster.yaml_files import load_yaml, read_text
from jobs.notice import Notice
from workflows.evaluation.cost import Traffic
from workflows.recipe import Name, Recipe
from workflows.settings import Publish, RunSettings
from workflows.steps import digest


class Job(Recipe):
    """A recipe, its name, tenant, cluster, destination, and the traffic that its costs are counted for."""

    name: Name = Field(description="The release's name.")
    tenant: Name = Field("default", description="Business unit that the run is accounted to.")
    hardware: str = Field("cpu-local", description="Hardware profile for latency and money, or a profile file.")
    traffic: Traffic = Field(Traffic(), description="What the model serves; decides what a speed-up is worth.")
    cluster: ClusterSpec = Field(ClusterSpec(), description="Where and how wide the work runs.")
    publish: Publish = Field(description="Where the release goes.")
    notify: tuple[Notice, ...] = Field((), max_length=16, description="Webhooks that are told how the run ended.")

    @property
    def recipe(self) -> Recipe:
        """The part that determines the result's bytes."""
        return Recipe.model_validate({name: getattr(self, name) for name in Recipe.model_fields})

    @property
    def settings(self) -> RunSettings:
        """The part that does not."""
        return RunSettings(
            run=self.run,
            name=self.name,
            publish=self.publish,
            cluster=self.cluster,
            hardware=self.hardware,
            traffic=self.traffic,
        )

    @property
    def run(self) -> str:
        """The run's name: the same job always means the same run, whatever cluster it goes to and whoever signs."""
        beside: Any = {"cluster": True, "hardware": True, "traffic": True, "notify": True, "publish": {"sign_with"}}
        what = self.model_dump(mode="json", exclude=beside)
        return f"{self.name}-{digest(what)[:12]}"


def read_job(path: Path) -> Job:
    """Reads and validates a job file.

    Raises:
        InputError: it is missing, too large, no YAML, or a field is wrong; the message names the field.
    """
    return parse_job(read_text(path, "a job file"), str(path))


def parse_job(text: str, origin: str) -> Job:
    """The job in a YAML text; `origin` names it in errors."""
    content = load_yaml(text, origin)
    if not isinstance(content, dict):
        raise InputError(f"{origin}: a job is a mapping of fields, this is a {type(content).__name__}")
    try:
        return Job.model_validate(content)
    except ValidationError as error:
        raise InputError(explain(error, origin), "`karikomi fields` lists every field.") from error


def dump_job(job: Job) -> bytes:
    """A job file that `parse_job` reads as this very job; a webhook's URL is no longer in it."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True).encode()


def explain(error: ValidationError, origin: str, root: type[BaseModel] = Job) -> str:
    """One line per wrong field of a file that a `root` is written in: its path, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"]) or root.__name__.lower()
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown field; allowed here: {', '.join(allowed_fields(problem['loc'][:-1], root))}"
        elif "notify" in problem["loc"]:
            pass  # what was given may be a secret
        elif problem["type"] != "missing" and isinstance(problem["input"], str | int | float):
            message += f" (given: {problem['input']!r})"
        lines.append(f"{origin}: {field}: {message}")
    return "\n".join(lines)


def allowed_fields(path: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    """The fields of the model that a path within a `root` leads to."""
    model: Any = root
    for part in path:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation if part in model.model_fields else None
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            model = next((one for one in candidates if hasattr(one, "model_fields")), model)
    return list(model.model_fields)
