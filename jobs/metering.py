"""What a step holds of the machines, so that a run's use can be counted, also that of steps that never ended."""

import math
import time

from cluster.hardware.profiles import load_profile
from jobs.job import Job
from jobs.records import Usage
from workflows.events import Event, StepEnded, StepStarted

ON_WORKERS = ("gradients", "score", "predict", "weigh", "mix", "evolve", "prune", "evaluate")


def held(job: Job, step: str, stage: int) -> tuple[float, float]:
    """CPUs and GPUs that a step reserves; the driver's own CPU is counted where a step reserves nothing.

    Args:
        job: gives workers, ranks and threads.
        step: the step's name.
        stage: counts from 1; 0 outside the stages.
    """
    gpus = 1.0 if job.device == "cuda" else 0.0
    tune = job.stages[stage - 1].tune if stage else None
    if step in ON_WORKERS:
        return job.cluster.workers * job.threads, job.cluster.workers * job.cluster.gpus_per_worker
    if step == "tune" and tune is not None:
        return tune.ranks * job.threads, tune.ranks * gpus
    if step == "measure":
        return load_profile(job.hardware).cores, gpus
    return 1.0, 0.0


def most_held(job: Job) -> tuple[int, int]:
    """CPUs and GPUs that a run holds at most at once, in whole ones."""
    stages = range(1, len(job.stages) + 1)
    steps = [held(job, step, stage) for step in ("prune", "tune") for stage in stages]
    steps.append(held(job, "measure", 0))
    return math.ceil(max(one[0] for one in steps)), math.ceil(max(one[1] for one in steps))


class Meter:
    """Adds up what a run's steps hold while they go on; a listener."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._began = time.monotonic()
        self._step: tuple[float, float, float] | None = None  # since when, CPUs, GPUs
        self._ended = Usage()

    def __call__(self, event: Event) -> None:
        """Notes where a step begins and ends."""
        if isinstance(event, StepStarted):
            self._step = (time.monotonic(), *held(self._job, event.name, event.stage))
        elif isinstance(event, StepEnded) and not event.resumed:
            self._ended += self._at_hand()
            self._step = None

    def usage(self) -> Usage:
        """So far, the step at hand included."""
        total = self._ended + self._at_hand()
        return total.model_copy(update={"seconds": time.monotonic() - self._began})

    def _at_hand(self) -> Usage:
        if self._step is None:
            return Usage()
        since, cpus, gpus = self._step
        seconds = time.monotonic() - since
        return Usage(cpu_seconds=cpus * seconds, gpu_seconds=gpus * seconds)
