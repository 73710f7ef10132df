"""Prometheus metrics of all runs, made from what the runs leave in the store.

Not from within the drivers: a driver lives for minutes on some machine of some cluster, so that a scrape would miss
its end, and a lost one cannot say that it is lost. The records can: they are at most a heartbeat old, they are there
when the cluster is gone, and one exporter serves any number of clusters.

Cardinality: series with the label `run` are given for runs of the last days only, some thirty for each run. Sums by
tenant, state and exit code count every run that the store knows, and grow with tenants only.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.errors import InputError
from cluster.storage import Store
from jobs.measures import Measures, read_measures
from jobs.records import Attempt, Run, attempt_numbers, read_run

log = structlog.get_logger()
READERS = 16  # requests to the store at once
RUN = ("tenant", "name", "run")
CODES = (0, 1, 2, 3, 75, 130)  # exit codes of the contract


@dataclass(frozen=True)
class Observed:
    """A run and its last attempt's numbers."""

    run: Run
    measures: Measures | None

    @property
    def labels(self) -> tuple[str, str, str]:
        """The values of `RUN`."""
        started = self.run.last.started
        return started.tenant, started.name, self.run.run


class RunCollector(Collector):
    """Reads a store whenever it is asked; what has ended is read once.

    Args:
        store: whose runs.
        days: runs that did anything within so many days have series of their own.
    """

    def __init__(self, store: Store, days: float) -> None:
        self.store = store
        self.days = days
        self._ended: dict[tuple[str, int], Observed] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """All metrics, now."""
        with self._lock, ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(self._observe, self.store.folders("runs/")))
        now = datetime.now(UTC)
        observed = [one for one in found if isinstance(one, Observed)]
        for one in found:
            if isinstance(one, InputError):
                log.warning("records that cannot be read", error=one.message)
        yield from families(observed, now, now - timedelta(days=self.days))
        unreadable = GaugeMetricFamily("karikomi_runs_unreadable", "Runs whose records cannot be read.")
        unreadable.add_metric([], sum(isinstance(one, InputError) for one in found))
        yield unreadable

    def _observe(self, name: str) -> Observed | InputError | None:
        """A run; None when nobody ever attempted it; an error when its records are another version's."""
        numbers = attempt_numbers(self.store, name)
        if not numbers:
            return None
        key = (name, numbers[-1])
        if key not in self._ended:
            try:
                run = read_run(self.store, name)
            except InputError as error:  # one broken run must not hide all others
                return error
            if run is None:
                return None
            observed = Observed(run, read_measures(self.store, name, numbers[-1]))
            if run.last.ended is None:
                return observed
            self._ended[key] = observed
        return self._ended[key]


def exposition(store: Store, days: float) -> bytes:
    """All metrics in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RunCollector(store, days))
    return generate_latest(registry)


def families(observed: Iterable[Observed], now: datetime, since: datetime) -> Iterator[Metric]:
    """Every metric with its samples; a metric without samples is named all the same.

    Args:
        observed: all runs.
        now: tells which ones are lost.
        since: runs that did nothing after it are in the sums only.
    """
    everything = list(observed)
    recent = [one for one in everything if last_sign(one.run.last) >= since]
    yield from _sums(everything, now)
    yield from _states(recent, now)
    yield from _progress(recent)
    yield from _numbers(recent)
    yield from _use(recent)


def last_sign(attempt: Attempt) -> datetime:
    """When an attempt last told anything."""
    return (attempt.ended or attempt.progress or attempt.started).at


def _sums(observed: list[Observed], now: datetime) -> Iterator[Metric]:
    runs = GaugeMetricFamily("karikomi_runs", "Runs by tenant and state.", labels=("tenant", "state"))
    counts = Counter((one.labels[0], one.run.state(now)) for one in observed)
    for (tenant, state), count in sorted(counts.items()):
        runs.add_metric([tenant, state], count)
    yield runs
    ends = CounterMetricFamily(
        "karikomi_attempts_ended", "Attempts that ended, by exit code.", labels=("tenant", "code")
    )
    codes = Counter(
        (one.labels[0], attempt.ended.code) for one in observed for attempt in one.run.attempts if attempt.ended
    )
    tenants = sorted({one.labels[0] for one in observed})
    for tenant in tenants:  # zeros too: Prometheus sees no increase in a series that begins with its first failure
        for code in sorted({*CODES, *(code for whose, code in codes if whose == tenant)}):
            ends.add_metric([tenant, str(code)], codes[tenant, code])
    yield ends
    cpu = CounterMetricFamily("karikomi_tenant_cpu_seconds", "CPU-seconds held by steps.", labels=("tenant",))
    gpu = CounterMetricFamily("karikomi_tenant_gpu_seconds", "GPU-seconds held by steps.", labels=("tenant",))
    for tenant in tenants:
        usages = [one.run.usage for one in observed if one.labels[0] == tenant]
        cpu.add_metric([tenant], sum(one.cpu_seconds for one in usages))
        gpu.add_metric([tenant], sum(one.gpu_seconds for one in usages))
    yield from (cpu, gpu)


def _states(recent: list[Observed], now: datetime) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "karikomi_run_info", "Always 1.", labels=(*RUN, "cluster", "release", "digest", "karikomi")
    )
    state = GaugeMetricFamily("karikomi_run_state", "1 for the state that a run is in.", labels=(*RUN, "state"))
    started = GaugeMetricFamily("karikomi_run_started_timestamp_seconds", "When it was first asked for.", labels=RUN)
    sign = GaugeMetricFamily("karikomi_run_last_sign_timestamp_seconds", "When it last told anything.", labels=RUN)
    wait = GaugeMetricFamily("karikomi_run_queue_seconds", "How long its last attempt waited.", labels=RUN)
    attempts = CounterMetricFamily("karikomi_run_attempts", "Attempts so far.", labels=RUN)
    for one in recent:
        last = one.run.last
        release, digest = (last.ended.release, last.ended.digest[:12]) if last.ended else ("", "")
        info.add_metric([*one.labels, last.started.cluster, release, digest, last.started.karikomi], 1)
        state.add_metric([*one.labels, one.run.state(now)], 1)
        started.add_metric(one.labels, one.run.attempts[0].started.at.timestamp())
        sign.add_metric(one.labels, last_sign(last).timestamp())
        until = one.measures.began if one.measures else now if not last.ended and not last.progress else None
        if until is not None:  # a run that was not submitted is claimed after it began: it waited for nothing
            wait.add_metric(one.labels, max(0.0, (until - last.started.at).total_seconds()))
        attempts.add_metric(one.labels, len(one.run.attempts))
    yield from (info, state, started, sign, wait, attempts)


def _progress(recent: list[Observed]) -> Iterator[Metric]:
    stage = GaugeMetricFamily("karikomi_run_stage", "Stage at hand, from 1; 0 outside them.", labels=RUN)
    stages = GaugeMetricFamily("karikomi_run_stages", "Stages in all.", labels=RUN)
    done = GaugeMetricFamily(
        "karikomi_run_step_done", "Blocks, windows or steps done of the step at hand.", labels=(*RUN, "step")
    )
    total = GaugeMetricFamily("karikomi_run_step_total", "Of how many.", labels=(*RUN, "step"))
    for one in recent:
        progress = one.run.last.progress
        if progress is not None:
            stage.add_metric(one.labels, progress.stage)
            stages.add_metric(one.labels, progress.stages)
            done.add_metric([*one.labels, progress.step], progress.done)
            total.add_metric([*one.labels, progress.step], progress.total)
    yield from (stage, stages, done, total)


def _numbers(recent: list[Observed]) -> Iterator[Metric]:
    at_stage = (*RUN, "stage")
    seconds = GaugeMetricFamily("karikomi_run_step_seconds", "Seconds that a step took.", labels=(*at_stage, "step"))
    passed = GaugeMetricFamily("karikomi_run_gate_passed", "1 when a stage met its gates.", labels=at_stage)
    increase = GaugeMetricFamily(
        "karikomi_run_gate_perplexity_increase", "Perplexity over the dense model's, as a share.", labels=at_stage
    )
    worst = GaugeMetricFamily("karikomi_run_gate_worst_slice_increase", "The same on the worst slice.", labels=at_stage)
    drop = GaugeMetricFamily("karikomi_run_gate_accuracy_drop", "Accuracy lost, of classifiers.", labels=at_stage)
    worst_drop = GaugeMetricFamily(
        "karikomi_run_gate_worst_slice_drop", "The same on the worst slice.", labels=at_stage
    )
    weight = GaugeMetricFamily("karikomi_run_weight_bytes", "Bytes of all weights.", labels=(*RUN, "model"))
    for one in recent:
        if one.measures is None:
            continue
        for step in one.measures.steps:
            seconds.add_metric([*one.labels, str(step.stage), step.step], step.seconds)
        for gate in one.measures.gates:
            labels = [*one.labels, str(gate.stage)]
            passed.add_metric(labels, int(gate.passed))
            for family, number in (
                (increase, gate.perplexity_increase),
                (worst, gate.worst_slice_increase),
                (drop, gate.accuracy_drop),
                (worst_drop, gate.worst_slice_drop),
            ):
                if number is not None:
                    family.add_metric(labels, number)
        for model, size in (("dense", one.measures.dense_bytes), ("compressed", one.measures.compressed_bytes)):
            if size is not None:
                weight.add_metric([*one.labels, model], size)
    yield from (seconds, passed, increase, worst, drop, worst_drop, weight)


def _use(recent: list[Observed]) -> Iterator[Metric]:
    cpu = CounterMetricFamily("karikomi_run_cpu_seconds", "CPU-seconds held by all its attempts.", labels=RUN)
    gpu = CounterMetricFamily("karikomi_run_gpu_seconds", "GPU-seconds held by all its attempts.", labels=RUN)
    for one in recent:
        cpu.add_metric(one.labels, one.run.usage.cpu_seconds)
        gpu.add_metric(one.labels, one.run.usage.gpu_seconds)
    yield from (cpu, gpu)
