"""The whole workflow on one page: from a dense model to a published smaller one.

Every arrow of the picture in the README is a step of the journal; what a step gives is a small record that names
objects in the store. So a run that was cut off anywhere goes on where it was, and `plan` is this same page read dry.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.errors import InputError
from cluster.hardware.profiles import load_profile
from cluster.paths import cache_directory
from cluster.session import session
from cluster.storage import Store, Stored, open_store
from workflows import stages
from workflows.allocating import Allocating, Shares, weighed_by
from workflows.data.labelled import build_labelled
from workflows.data.sources import fingerprint
from workflows.data.windows import build_all, check_known, to_parquet
from workflows.evaluation.gates import judge
from workflows.evaluation.quality import Quality
from workflows.events import GateJudged, Listener, ignore
from workflows.formats.huggingface import Formatted, format_release
from workflows.measuring import measure
from workflows.models.labels import labels_of
from workflows.models.source import Source, load_tokenizer, resolve_source
from workflows.models.state import ModelState
from workflows.publishing import Published, publish
from workflows.recipe import Recipe, Stage
from workflows.release import find_version
from workflows.reports.documents import make_report, release_documents
from workflows.reports.report import Measured, Report, StageHistory
from workflows.settings import RunSettings
from workflows.signing import PrivateKey
from workflows.steps import Journal, Work
from workflows.tuning.tune import Tuned, TuneWork, tune


class Outcome(BaseModel):
    """How a run ended.

    Attributes:
        published: the release; None when no stage met its gates (or `after_failure: stop`).
        report: its report; None when nothing was published.
        history: every stage with its numbers, the failed one too.
        complete: the last stage met its gates.
    """

    model_config = ConfigDict(frozen=True)

    published: Published | None
    report: Report | None
    history: tuple[StageHistory, ...]
    complete: bool


def compress(
    recipe: Recipe,
    settings: RunSettings,
    listener: Listener = ignore,
    stop: Callable[[], bool] = lambda: False,
    dry: bool = False,
) -> Outcome:
    """Carries a recipe out, or goes on with it.

    Args:
        recipe: what determines the result's bytes.
        settings: the run's name, destination and machines.
        listener: told of every step and its progress.
        stop: asked between pieces of work.
        dry: run nothing and write nothing; the first step that is not done raises `NotDone`.

    Raises:
        InputError: something that the user wrote cannot be done; nothing was written.
        Unavailable, Cancelled: what was finished is recorded; the same call goes on.
    """
    store = open_store(settings.publish.to)
    source = resolve_source(recipe.model, cache_directory())
    dense = ModelState(source=source.uri, source_digest=source.digest, config=source.config, store=store.uri)
    check_before(recipe, settings, dense, store)
    journal = Journal(store, settings.run, listener, dry)
    if not dry:
        store.check_writable()
    with ExitStack() as machines:
        cpus = max(settings.cluster.workers, *(one.tune.ranks for one in recipe.stages if one.tune), 1) * recipe.threads
        connect = cache(lambda: machines.enter_context(session(settings.cluster, cpus)))
        return Run(recipe, settings, source, dense, journal, connect, stop).outcome()


def check_before(recipe: Recipe, settings: RunSettings, dense: ModelState, store: Store) -> None:
    """Refuses here, before any work and any write, whatever can be refused.

    Raises:
        InputError: a ratio that this model cannot meet, a hardware profile that is not there, a key that cannot sign,
            or a version that is taken.
    """
    for stage in recipe.stages:
        stages.config_after(dense.config, recipe, stage.sparsity)
    stages.check_task(dense, recipe)
    stages.check_pattern(dense, recipe)
    load_profile(settings.hardware)
    if settings.publish.sign_with:
        PrivateKey(Path(settings.publish.sign_with))
    if settings.publish.version != "auto":
        taken = find_version(store, settings.name, settings.publish.version)
        if taken is not None and taken.run != settings.run:
            raise InputError(
                f"publish.version: {settings.name}@{settings.publish.version} exists already, from run {taken.run}",
                "Choose another version, or version: auto.",
            )


def check_sound(model: str, quality: Quality) -> None:
    """Refuses a dense model that is broken: with weights of NaN or infinity there is nothing to hold others against.

    Raises:
        InputError: it has no perplexity.
    """
    if not quality.finite:
        raise InputError(
            f"model: {model}: its losses on data.evaluation are not finite, before anything was pruned: it is broken",
            "Look for NaN or infinity in its weights, or for weights that overflow in its dtype.",
        )


class WindowsMade(BaseModel):
    """The token windows of all roles, one object in the store."""

    model_config = ConfigDict(frozen=True)

    stored: Stored


@dataclass
class Run:
    """One execution: each step is told what it depends on, and knows nothing else."""

    recipe: Recipe
    settings: RunSettings
    source: Source
    dense: ModelState
    journal: Journal
    connect: Callable[[], None]
    stop: Callable[[], bool]

    def outcome(self) -> Outcome:
        """All of it, in order: windows, dense quality, stages with gates, format, measurement, release."""
        windows = self.windows()
        dense_quality = self.quality(self.dense, windows, 0)
        check_sound(self.recipe.model, dense_quality)
        history: list[StageHistory] = []
        good, state = self.dense, self.dense
        for number in range(1, len(self.recipe.stages) + 1):
            state, entry = self.stage(number, state, dense_quality, windows)
            history.append(entry)
            if not entry.verdict.passed:
                break
            good = state
        complete = history[-1].verdict.passed
        if good is self.dense or (not complete and self.recipe.gates.after_failure == "stop"):
            return Outcome(published=None, report=None, history=tuple(history), complete=False)
        release = self.formatted(good)
        measured = self.measured(good)
        report = make_report(
            self.recipe, self.settings, self.source, self.dense, dense_quality, tuple(history), release, measured,
            self.journal.seconds,
        )  # fmt: skip
        return Outcome(
            published=self.publish(release, report), report=report, history=tuple(history), complete=complete
        )

    def stage(
        self, number: int, before: ModelState, dense_quality: Quality, windows: Stored
    ) -> tuple[ModelState, StageHistory]:
        """One turn of the loop: prune, tune, gate; a failed gate may tune once more."""
        stage = self.recipe.stages[number - 1]
        allocating = self.allocating(number, before, windows, stage)
        state = self.prune(number, before, windows, stage, allocating.shares(), allocating.norms())
        pruned = final = self.quality(state, windows, number)
        verdict = judge(dense_quality, final, self.recipe.gates, self.recipe.seed)
        tuned, retried = None, False
        if stage.tune:
            for steps in (stage.tune.steps, stage.tune.retry_steps):
                if steps and not (tuned and verdict.passed):
                    retried = tuned is not None
                    state = self.tune(number, state, windows, stage, steps)
                    tuned = final = self.quality(state, windows, number)
                    verdict = judge(dense_quality, final, self.recipe.gates, self.recipe.seed)
        self.journal.listener(
            GateJudged(
                number, verdict.passed, verdict.sentence, verdict.increase, verdict.worst_increase, verdict.measure
            )
        )
        return state, StageHistory(
            stage=number,
            sparsity=stage.sparsity,
            parameters=stages.parameter_count(state),
            pruned=pruned,
            tuned=tuned,
            retried=retried,
            verdict=verdict,
        )

    def windows(self) -> Stored:
        """Text → token windows."""
        data = self.recipe.data
        sources = (data.calibration, data.tuning, data.evaluation)
        inputs = {
            "data": data,
            "content": [fingerprint(one) for one in sources],
            "source": self.source.digest,
            "seed": self.recipe.seed,
        }

        def make(work: Work) -> WindowsMade:
            tokenizer = load_tokenizer(self.source)
            if self.recipe.classifies:
                built = build_labelled(data, tokenizer, labels_of(self.source.config), self.recipe.seed)
            else:
                built = build_all(data, tokenizer, self.recipe.seed)
            check_known(built, self.dense.config["vocab_size"], tokenizer)
            content = to_parquet(built)
            # The first thing that a run writes, once its data are known to be good: what it was asked for, resolved.
            asked = {"recipe": self.recipe.model_dump(mode="json"), "settings": self.settings.model_dump(mode="json")}
            work.store.put_json(f"{self.journal.root}/job.json", asked)
            return WindowsMade(stored=work.store.put(f"{work.prefix('data')}.parquet", content))

        return self.journal.step("windows", inputs, WindowsMade, make).stored

    def quality(self, state: ModelState, windows: Stored, number: int) -> Quality:
        """How well a model predicts."""
        inputs = {"model": identity(state), "windows": windows.sha256, **self.how()}

        def judge_it(work: Work) -> Quality:
            self.connect()
            return stages.evaluate(work, state, windows, self.recipe, self.settings.cluster, self.stop)

        return self.journal.step("evaluate", inputs, Quality, judge_it, number)

    def allocating(self, number: int, before: ModelState, windows: Stored, stage: Stage) -> Allocating:
        """Score and allocate; no steps at all where every linear gives, and every token counts, the same."""
        how = {
            "model": identity(before),
            "windows": windows.sha256,
            "shards": self.recipe.data.shards,
            "dtype": self.recipe.dtype,
            **self.how(),
        }
        return Allocating(
            self.recipe, self.settings.cluster, self.journal, self.connect, self.stop,
            number, before, windows, stage.sparsity, how,
        )  # fmt: skip

    def prune(
        self,
        number: int,
        before: ModelState,
        windows: Stored,
        stage: Stage,
        shares: Shares,
        norms: Stored | None,
    ) -> ModelState:
        """The layer-wise engine over all blocks."""
        recipe = self.recipe
        config = stages.config_after(self.dense.config, recipe, stage.sparsity)
        inputs = {
            "before": identity(before),
            "windows": windows.sha256,
            "shards": recipe.data.shards,
            "pattern": recipe.target.pattern,
            "sparsity": stage.sparsity,
            "solver": recipe.solver,
            "recovery": {"toward": identity(self.dense), "how": recipe.recovery} if recipe.recovery else None,
            "shares": shares,
            "propagate": recipe.propagate,
            "dtype": recipe.dtype,
            **weighed_by(norms),
            **self.how(),
        }

        def prune_it(work: Work) -> ModelState:
            self.connect()
            return stages.prune(
                work, before, self.dense, config, windows, recipe, stage.sparsity, shares, norms,
                self.settings.cluster, self.stop,
            )  # fmt: skip

        return self.journal.step("prune", inputs, ModelState, prune_it, number)

    def tune(self, number: int, state: ModelState, windows: Stored, stage: Stage, steps: int) -> ModelState:
        """DeepSpeed on the surviving weights."""
        assert stage.tune is not None
        settings = stage.tune
        inputs = {
            "student": identity(state),
            "teacher": identity(self.dense),
            "windows": windows.sha256,
            "tune": settings,
            "steps": steps,
            "seed": self.recipe.seed,
            **self.how(),
        }

        def tune_it(work: Work) -> Tuned:
            self.connect()
            order = TuneWork(
                student=state,
                teacher=self.dense,
                windows_key=windows.key,
                tune=settings,
                steps=steps,
                key_prefix=work.prefix("blocks"),
                dtype=stages.serving_dtype(state),
                device=self.recipe.device,
                threads=self.recipe.threads,
                seed=self.recipe.seed,
            )
            return tune(order, lambda done, total, numbers: work.advanced(done, total, **numbers), self.stop)

        tuned = self.journal.step("tune", inputs, Tuned, tune_it, number)
        return state.model_copy(update={"blocks": tuned.blocks})

    def formatted(self, state: ModelState) -> Formatted:
        """The release's files."""
        form, sparse = self.recipe.format, self.recipe.target.pattern != "ffn"
        inputs = {"model": identity(state), "config": state.config, "format": form}
        return self.journal.step(
            "format",
            inputs,
            Formatted,
            lambda work: format_release(state, self.source.others, work.prefix("release"), form, sparse),
        )

    def measured(self, state: ModelState) -> Measured:
        """Latency and memory, side by side."""
        profile, traffic = load_profile(self.settings.hardware), self.settings.traffic
        inputs = {
            "dense": identity(self.dense),
            "compressed": identity(state),
            "profile": profile,
            "traffic": traffic,
        }

        def measure_it(work: Work) -> Measured:
            self.connect()
            stuck_after = self.settings.cluster.block_seconds
            return measure(self.dense, state, self.recipe, profile, traffic, stuck_after, self.stop)

        return self.journal.step("measure", inputs, Measured, measure_it)

    def publish(self, release: Formatted, report: Report) -> Published:
        """The release, and its one atomic commit."""
        settings = self.settings
        inputs: dict[str, Any] = {"files": release.files, "version": settings.publish.version}
        if settings.publish.sign_with:
            inputs["signed"] = True

        def publish_it(work: Work) -> Published:
            papers = release_documents(work.store, self.recipe, settings, self.source, release, report)
            version, form = settings.publish.version, self.recipe.format
            return publish(work.store, settings.name, version, release.files, papers, settings.run, form)

        return self.journal.step("publish", inputs, Published, publish_it)

    def how(self) -> dict[str, str | int]:
        """What changes bits wherever a model is run."""
        return {"device": self.recipe.device, "threads": self.recipe.threads}


def identity(state: ModelState) -> list[str]:
    """The digests that make a model what it is; where its bytes lie does not matter."""
    return [state.source_digest, *(block.sha256 for block in state.blocks)]
