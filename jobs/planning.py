"""What a run would do, as sentences; nothing runs and nothing is written."""

from collections.abc import Iterator

from cluster.paths import cache_directory
from jobs.estimating import admitted
from jobs.job import Job
from jobs.pricing import money
from jobs.records import asked_by
from workflows.compress import compress
from workflows.evaluation.measures import ACCURACY, PERPLEXITY
from workflows.events import Event, StepEnded
from workflows.memory import worker_memory
from workflows.models.source import resolve_source
from workflows.steps import NotDone

GIB = 1 << 30


def sentences(job: Job) -> Iterator[str]:
    """One sentence each: model, stages, machines, memory, destination, and which steps are done already.

    Raises:
        InputError: whatever a run would refuse at its start.
    """
    admission, expected = admitted(job, asked_by())
    job = admission.job
    recipe, cluster = job.recipe, job.cluster
    source = resolve_source(recipe.model, cache_directory())
    done: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StepEnded):
            done.append(f"{event.name} of stage {event.stage}" if event.stage else event.name)

    try:
        compress(recipe, job.settings, note, dry=True)
        following = None
    except NotDone as next_step:
        following = f"{next_step.name} of stage {next_step.stage}" if next_step.stage else next_step.name
    yield f"Run {job.run} for tenant {job.tenant}."
    yield (
        f"Model: {recipe.model}, {source.config['num_hidden_layers']} blocks of width {source.config['hidden_size']}, "
        f"digest {source.digest[:12]}; it is only read."
    )
    measure = ACCURACY if recipe.classifies else PERPLEXITY
    for number, stage in enumerate(recipe.stages, 1):
        tune = stage.tune
        repair = f"then {tune.steps} tuning steps on {tune.ranks} ranks (ZeRO-{tune.zero})" if tune else "untuned"
        recovery = f"{recipe.recovery.steps} steps of recovery per block, " if recipe.recovery else ""
        allocation = "" if recipe.allocation.policy == "uniform" else f"shares by {recipe.allocation.policy}, "
        weights = "tokens weighed by gradient, " if recipe.weighs_tokens else ""
        how = "channels" if recipe.target.pattern == "ffn" else f"{recipe.solver.name}, pattern {recipe.target.pattern}"
        yield (
            f"Stage {number} of {len(recipe.stages)}: remove {stage.sparsity:.0%} of the pruned linears ({how}), "
            f"{allocation}{weights}{recovery}{repair}; gate: {measure.allowed(recipe.gates)}."
        )
    memory = worker_memory(source.config, recipe, cluster)
    yield (
        f"Machines: {cluster.workers} workers, each {recipe.threads} CPU threads and {cluster.gpus_per_worker:g} GPUs, "
        f"on {'an embedded Ray' if cluster.address == 'embedded' else cluster.address}."
    )
    kept = f", kept for gradients {memory.boundaries / GIB:.2f}" if memory.boundaries else ""
    yield (
        f"Memory of a worker: {memory.peak / GIB:.2f} GiB at most (two blocks {2 * memory.block / GIB:.2f}, "
        f"activations {(memory.activations + memory.halted) / GIB:.2f}, statistics {memory.grams / GIB:.2f}{kept})."
    )
    usage = expected.usage
    yield (
        f"Estimate: {money(expected.usd)} for {usage.cpu_seconds / 3600:,.2f} CPU-hours and "
        f"{usage.gpu_seconds / 3600:,.2f} GPU-hours, {expected.basis}."
    )
    yield from admission.sentences
    yield f"Done already: {', '.join(done) if done else 'nothing'}."
    yield f"Next: {following}." if following else "Nothing is left to do."
    for one in job.notify:
        yield f"Tells {one.target} when it is {', '.join(one.on)}."
    yield f"Publishes {job.name}@{job.publish.version} to {job.publish.to}."
