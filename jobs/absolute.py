"""A job's local paths made absolute: it will be started in another directory than the one it was written in."""

import os
from pathlib import Path

from cluster.hardware.profiles import is_file
from cluster.paths import is_there, local_path
from jobs.job import Job
from workflows.recipe import DataSource


def absolute_paths(job: Job) -> tuple[Job, tuple[str, ...]]:
    """The job with its local paths absolute, and those that were relative, as they are now.

    Raises:
        InputError: it publishes to the home directory of nobody.
    """
    made: set[str] = set()

    def absolute(path: Path) -> str:
        if not path.is_absolute():
            made.add(str(path.absolute()))
        return str(path.absolute())

    def if_there(value: str) -> str:
        """A path that is there; anything else (addresses, hub ids) as it is: it may be one where it runs."""
        path = Path(os.path.expanduser(value))
        return absolute(path) if "://" not in value and is_there(path) else value

    sources = {role: one for role, one in job.data if isinstance(one, DataSource)}
    data = {role: one.model_copy(update={"source": if_there(one.source)}) for role, one in sources.items()}
    to = job.publish.to
    changes = {
        "model": if_there(job.model),
        "data": job.data.model_copy(update=data),
        "hardware": if_there(job.hardware) if is_file(job.hardware) else job.hardware,
        "publish": job.publish.model_copy(update={"to": to if "://" in to else absolute(local_path(to))}),
    }
    return job.model_copy(update=changes), tuple(sorted(made))
