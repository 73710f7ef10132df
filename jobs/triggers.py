"""What schedules look at: has the model changed, does the live release still meet its gates, is there work at all."""

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cluster.marks import Mark, marks
from cluster.paths import cache_directory, local_path
from cluster.storage import MissingKey, Store, open_store
from jobs.job import Job
from jobs.pulling import pull_release
from jobs.schedules import Schedule
from workflows.compress import compress
from workflows.evaluation.live import judge_live
from workflows.models.source import resolve_source
from workflows.recipe import DataSource
from workflows.release import find_version
from workflows.steps import NotDone, digest

SETTLED = timedelta(seconds=60)  # a model whose files changed later than this ago may still be being written


def model_digest(store: Store, schedule: Schedule) -> str | None:
    """The digest of a schedule's model; None while it is being written.

    A look at sizes and times comes first; only if one of them changed, the model is read through.

    Raises:
        InputError: it is missing, unsafe or not covered.
        Unavailable: its place is out of reach.
    """
    seen = look(schedule.job.model)
    if any(datetime.now(UTC) - one.changed < SETTLED for one in seen.values()):
        return None
    key, mark = f"schedules/{schedule.name}/model.json", digest({name: one.mark for name, one in seen.items()})
    try:
        known = store.get_json(key)
    except MissingKey:
        known = {}
    if seen and known.get("mark") == mark and known.get("model") == schedule.job.model:
        return str(known["digest"])
    found = resolve_source(schedule.job.model, cache_directory()).digest
    store.put_json(key, {"model": schedule.job.model, "mark": mark, "digest": found})
    return found


def look(model: str) -> dict[str, Mark]:
    """Marks of a model's files; none for one on a hub, which is resolved each time."""
    path = local_path(model)
    if path.suffix == ".gguf" and not model.startswith("s3://"):
        return {name: one for name, one in marks(open_store(str(path.parent))).items() if name == path.name}
    return marks(open_store(model)) if model.startswith("s3://") or path.is_dir() else {}


def finished(job: Job) -> str | None:
    """Says so when a run of the job would find everything done; the run is read dry, from its journal.

    The journal's keys hold the digests of model, recipe and data. So this is said of the same model and recipe only
    while the data are the same too: fresh data under an old address are other data.

    Raises:
        InputError: the job cannot be run.
    """
    try:
        outcome = compress(job.recipe, job.settings, dry=True)
    except NotDone:
        return None
    what = (
        f"{outcome.published.name}@{outcome.published.version} stands"
        if outcome.published
        else "no stage met its gates"
    )
    return f"same model, recipe and data digests as a run before: {what}"


def live_verdict(job: Job, data: DataSource) -> tuple[bool, str] | None:
    """Whether the latest release of the job's name meets the job's gates on this data, and by which numbers.

    It is fetched and verified first. None when nothing is published.

    Raises:
        InputError: release, dense model or data cannot be read.
    """
    pointer = find_version(open_store(job.publish.to), job.name, None)
    if pointer is None:
        return None
    release = f"{job.name}@{pointer.version}"
    with tempfile.TemporaryDirectory(prefix="karikomi-live-") as directory:
        pull_release(job.publish.to, release, Path(directory) / "release")
        live = resolve_source(str(Path(directory) / "release"), Path(directory))
        verdict = judge_live(resolve_source(job.model, cache_directory()), live, data, job.recipe)
    return verdict.passed, f"{release} on {data.source}: {verdict.sentence}"
