"""What a run will cost, before it runs: as its like did last time, or else from the model's size and the tokens."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import torch

from cluster.credentials import adopt
from cluster.hardware.profiles import HardwareProfile, load_profile
from cluster.paths import cache_directory
from cluster.storage import Store, open_store
from jobs.admission import Admission
from jobs.admitting import admit, with_gates
from jobs.job import Job
from jobs.ledger import committed, read_ledger
from jobs.ledger_row import month_of, shape_digest
from jobs.metering import most_held
from jobs.pricing import Account, account_for
from jobs.records import Usage
from jobs.tenants import Tenants, load_tenants
from workflows.allocating import FINALISTS, confirming
from workflows.models.expert_names import share_of_tokens
from workflows.models.experts import prunable
from workflows.models.source import config_of
from workflows.models.whole import empty_model, layers_of
from workflows.recipe import Recipe
from workflows.units import LEVELS, TRUSTS

CORE_FLOPS = 80e9  # a CPU thread with AVX-512 in matrix products, about as the demo ran
GPU_SHARE = 0.3  # of a GPU's peak rate
ALL_WINDOWS = 512  # taken for a role that reads all windows of its data: how many there are is known only then
STEP_SECONDS = 10.0  # to start a step's processes, read and write
MEASURING_SECONDS = 60.0  # latency of both models


@dataclass(frozen=True)
class Estimate:
    """What a run will hold and cost; `basis` says in a sentence where that comes from."""

    usage: Usage
    usd: float
    basis: str


def estimate(job: Job, config: dict[str, Any], account: Account, like: dict[str, Any] | None) -> Estimate:
    """A whole run's estimate; a pure function of what it is given.

    Args:
        job: what is asked.
        config: the dense model's config.json.
        account: its price.
        like: a row of the ledger of a run of the same model and shape; None when there is none.
    """
    if like is not None:
        names = ("seconds", "cpu_seconds", "gpu_seconds")
        usage = Usage(**{name: like[name] for name in names})
        return Estimate(usage, account.dollars(usage), f"as run {like['run']} of the same model and shape took")
    profile = load_profile(job.hardware)
    usage = usage_from_size(job, config, profile)
    rate = f"{GPU_SHARE:.0%} of a GPU's peak" if profile.bf16_tflops else f"{CORE_FLOPS / 1e9:g} GFLOP/s a CPU thread"
    basis = f"from the model's size and the tokens, at {rate}; no run of the same model and shape is in the ledger"
    return Estimate(usage, account.dollars(usage), basis)


def usage_from_size(job: Job, config: dict[str, Any], profile: HardwareProfile) -> Usage:
    """CPU- and GPU-seconds of a run from its floating-point operations and a flat time per step.

    A step holds its machines while they work and while they start, so GPU-seconds are at least the flat times.
    """
    work = operations(job.recipe, config)
    cpus, gpus = most_held(job)
    # The policies' own steps; then the score and the gradient pass, which other fields may ask for, too.
    scoring = {"uniform": 0, "owl": 1, "composite": 1, "measured": 3, "evolve": 4}[job.allocation.policy]
    scoring += job.recipe.needs_scores + job.recipe.needs_gradients
    steps = 5 + sum(scoring + (4 if stage.tune else 2) for stage in job.stages)
    flat = steps * STEP_SECONDS + MEASURING_SECONDS
    if gpus and profile.bf16_tflops:
        busy = work / (profile.bf16_tflops * 1e12 / max(profile.gpus, 1) * GPU_SHARE)
        seconds = busy / gpus + flat
        return Usage(seconds=seconds, cpu_seconds=seconds * cpus, gpu_seconds=busy + flat * gpus)
    busy = work / CORE_FLOPS
    seconds = busy / cpus + flat
    return Usage(seconds=seconds, cpu_seconds=busy + flat * cpus, gpu_seconds=seconds * gpus)


def operations(recipe: Recipe, config: dict[str, Any]) -> float:
    """Floating-point operations of a run: 2 a parameter and token forward, 4 more backward; Grams and solves besides.

    A block of `in` x `out` linears solved by second order takes about in³ for the factorisation and in² · out for the
    updates (Frantar & Alistarh 2023, SparseGPT); a Gram takes 2 · in² a token.
    """
    with torch.device("meta"):
        model = empty_model(config, torch.bfloat16)
    layers = layers_of(model, config)
    everything = sum(one.numel() for one in model.parameters())
    is_head = config.get("tie_word_embeddings") and not recipe.classifies
    embedding = 0 if is_head else model.get_input_embeddings().weight.numel()
    blocks = sum(one.numel() * share_of_tokens(name, config) for name, one in layers.named_parameters())
    # A tied embedding is the head, and works for every token; another is only looked up. Of experts, only some work.
    used = everything - sum(one.numel() for one in layers.parameters()) + blocks - embedding
    linears = prunable(layers[0]).items()
    squares = float(sum(one.in_features**2 * share_of_tokens(name, config) for name, one in linears)) * len(layers)
    solves = float(sum(one.in_features**2 * (one.in_features + one.out_features) for _, one in linears)) * len(layers)

    def tokens(role: str) -> int:
        source = getattr(recipe.data, role)
        return int((source.windows or ALL_WINDOWS) * source.length)

    judged = 2.0 * used * tokens("evaluation")
    total = judged
    for stage in recipe.stages:
        total += tokens("calibration") * (2 * 2.0 * blocks + 2.0 * squares) + solves + judged
        asked = recipe.allocation
        if recipe.needs_scores:  # forward once for the inputs
            total += tokens("calibration") * (2.0 * blocks + 2.0 * squares)
        if recipe.needs_gradients:  # forward, and the way back with its own forward
            total += tokens("calibration") * (8.0 * blocks + 4.0 * (used - blocks))
        if recipe.needs_saliency:  # the inverse that a saliency needs
            total += solves
        if asked.tries_levels:  # each linear at every level; each block alone, then mixes, on some windows
            generations = asked.generations if asked.policy == "evolve" else 0
            predicted = recipe.data.calibration.windows if generations else confirming(recipe)  # by the model itself
            total += predicted * recipe.data.calibration.length * 2.0 * blocks
            few = asked.windows * (len(layers) / 2 + generations * asked.children)
            many = confirming(recipe) * (len(TRUSTS) + generations * FINALISTS)
            total += LEVELS * solves + (few + many) * recipe.data.calibration.length * 2.0 * used
        if stage.tune:
            seen = stage.tune.steps * stage.tune.batch * stage.tune.ranks * recipe.data.tuning.length
            total += seen * used * (6.0 + (2.0 if stage.tune.distill else 0.0)) + judged
    return total


def estimate_here(job: Job, config: dict[str, Any], tenants: Tenants | None, now: datetime | None = None) -> Estimate:
    """A run's estimate by the ledger of the store that it publishes to."""
    now = now or datetime.now(UTC)
    tenant = tenants.tenants.get(job.tenant) if tenants else None
    return estimate(job, config, account_for(job, tenant), last_like_it(open_store(job.publish.to), job, now))


def last_like_it(store: Store, job: Job, now: datetime) -> dict[str, Any] | None:
    """The ledger's last finished run of the same model and shape, of this month or the one before."""
    shape = shape_digest(job)
    months = {month_of(now), month_of(now.replace(day=1) - timedelta(days=1))}
    rows = [row for month in months for row in read_ledger(store, month, job.tenant, now).to_pylist()]
    alike = [row for row in rows if (row["model"], row["shape_digest"], row["state"]) == (job.model, shape, "done")]
    return max(alike, key=lambda row: row["ended"], default=None)


def let_in(
    job: Job, config: dict[str, Any], by: str, where: str | None = None, now: datetime | None = None
) -> tuple[Admission, Estimate]:
    """Estimates a run, looks up what its tenant has spent, and lets it in or not.

    Args:
        job: as it was read.
        config: the dense model's config.json.
        by: who asks.
        where: the tenants file; else the one that KARIKOMI_TENANTS names; without either everything is allowed.
        now: for tests.

    Raises:
        InputError: it is not let in, with the figures; or the tenants file is wrong.
    """
    now = now or datetime.now(UTC)
    tenants = load_tenants(where)
    whole = estimate_here(job, config, tenants, now)
    if tenants is None:
        return admit(job, None, by, 0.0, whole.usd), whole
    tenant = tenants.tenants.get(job.tenant)
    run = with_gates(job, tenant).run if tenant else job.run
    spent, own = committed(open_store(job.publish.to), job.tenant, month_of(now), run, now)
    return admit(job, tenants, by, spent, max(whole.usd - own, 0.0)), whole


def admitted(job: Job, by: str) -> tuple[Admission, Estimate]:
    """Lets a job in as `let_in` does; what needs no reading of the model is refused first."""
    job = admit(job, load_tenants(), by, spent=0.0).job
    return let_in(job, config_of(job.model, cache_directory()), by)


def still_let_in(admission: Admission, by: str) -> None:
    """Looks again whether a job that was let in is so by what its tenant has spent by now; the estimate stands.

    Raises:
        InputError: it is not, with the figures.
    """
    tenants, job, now = load_tenants(), admission.job, datetime.now(UTC)
    if tenants is not None:  # else there is no budget
        spent, _ = committed(open_store(job.publish.to), job.tenant, month_of(now), job.run, now)
        admit(job, tenants, by, spent, admission.estimated)


def as_tenant(job: Job, by: str) -> Job:
    """The job as its tenant may run it on this machine; from here on this process uses the tenant's credentials.

    Without a tenants file it is the job as it was.

    Raises:
        InputError: the tenant may not, or its credentials are not on this machine.
    """
    if load_tenants() is None:
        return job
    admission, _ = admitted(job, by)
    os.environ.update(admission.environment)
    adopt()
    return admission.job
