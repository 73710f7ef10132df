"""Whether a tenant's job may be submitted, and with what: its rules, one after the other."""

from cluster.credentials import VARIABLE as CREDENTIALS
from cluster.errors import InputError
from cluster.hardware.profiles import is_file
from jobs.admission import Admission
from jobs.job import Job
from jobs.metering import most_held
from jobs.prefixes import check, within
from jobs.pricing import VARIABLE as ACCOUNT
from jobs.pricing import account_for, money
from jobs.tenants import Tenant, Tenants, tenant_of


def admit(job: Job, tenants: Tenants | None, by: str, spent: float, estimated: float = 0.0) -> Admission:
    """Lets a job in under its tenant's rules. Without a tenants file everything is allowed.

    Args:
        job: as it was read.
        tenants: the tenants file.
        by: who asks, as user@host or a schedule's name. It is what they say they are: the store's credentials and the
            cluster's door are what keeps strangers out.
        spent: US dollars that the tenant's runs of this month have cost or were let in for.
        estimated: US dollars that this run will still cost.

    Raises:
        InputError: not a member, outside of the prefixes, over quota for ever, over budget, or looser gates; with the
            field and the figures.
    """
    if tenants is None:
        environment = {ACCOUNT: account_for(job, None, estimated).model_dump_json()}
        return Admission(job, environment=environment, estimated=estimated)
    tenant = tenant_of(tenants, job.tenant, by)
    check(job, tenant.prefixes, job.tenant)
    check_store(job, tenant)
    check_price(job, tenant)
    admitted = with_gates(job, tenant)
    resources, quota = quota_of(job, tenant)
    budget = budget_of(job, tenant, spent, estimated)
    environment = {ACCOUNT: account_for(job, tenant, estimated).model_dump_json()}
    if tenant.credentials is not None:
        environment[CREDENTIALS] = tenant.credentials.name
    who = f"Tenant {job.tenant} ({tenant.business_unit or 'no business unit'}): {by} is a member."
    return Admission(admitted, resources, environment, (who, quota, *budget), estimated)


def check_store(job: Job, tenant: Tenant) -> None:
    """A tenant with a store of its own publishes nowhere else, so that its ledger is whole.

    Raises:
        InputError: it would.
    """
    if tenant.store is None:
        return
    if not (within(job.publish.to, tenant.store) and within(tenant.store, job.publish.to)):
        raise InputError(
            f"publish.to: {job.publish.to} is not tenant {job.tenant}'s store", f"Write publish: {{to: {tenant.store}}}"
        )


def check_price(job: Job, tenant: Tenant) -> None:
    """Under a budget the price is not the job's to say.

    Raises:
        InputError: it brings a hardware profile of its own.
    """
    if tenant.monthly_budget_usd is not None and is_file(job.hardware):
        raise InputError(
            f"hardware: {job.hardware} is a file of one's own, and tenant {job.tenant} has a budget",
            "Name a shipped profile; `prices` of the tenants file may give it another price.",
        )


def with_gates(job: Job, tenant: Tenant) -> Job:
    """The job with the tenant's gates where it names none itself.

    Raises:
        InputError: its own are looser than the tenant allows.
    """
    changes = {}
    language_model, classifier = ("perplexity_increase", "worst_slice_increase"), ("accuracy_drop", "worst_slice_drop")
    for name in classifier if job.classifies else language_model:
        limit, asked = getattr(tenant.gates, name), getattr(job.gates, name)
        if limit is None:
            continue
        if asked is None or name not in job.gates.model_fields_set:
            changes[name] = limit
        elif asked > limit and not tenant.gates.may_loosen:
            raise InputError(
                f"gates.{name}: {asked:g} is looser than tenant {job.tenant} allows ({limit:g})",
                f"Write at most {limit:g}, or leave it out.",
            )
    return job.model_copy(update={"gates": job.gates.model_copy(update=changes)}) if changes else job


def quota_of(job: Job, tenant: Tenant) -> tuple[dict[str, float], str]:
    """What the run's driver takes of the tenant's quota as long as it lives, and that as a sentence.

    Raises:
        InputError: more than there will ever be.
    """
    cpus, gpus = most_held(job)
    kind, what, asked = ("gpus", "GPU", gpus) if gpus else ("cpus", "CPU", cpus)
    if kind not in (quotas := tenant.quotas(job.tenant)):
        return {}, f"Holds {asked} {what}s at most; tenant {job.tenant} has no quota of them."
    resource, quota = quotas[kind]
    if asked > quota:
        fields = "cluster.workers, tune.ranks, " + ("cluster.gpus_per_worker" if gpus else "threads")
        raise InputError(
            f"tenant {job.tenant}: the run holds {asked} {what}s at once, the quota is {quota:g}",
            f"Ask for less: {fields}.",
        )
    sentence = f"Holds {asked} of tenant {job.tenant}'s {quota:g} {what}s ({resource}); waits while they are taken."
    return {resource: float(asked)}, sentence


def budget_of(job: Job, tenant: Tenant, spent: float, estimated: float) -> tuple[str, ...]:
    """What is left of the month's budget, as sentences.

    Raises:
        InputError: too little.
    """
    budget = tenant.monthly_budget_usd
    if budget is None:
        return (f"Tenant {job.tenant} has spent {money(spent)} this month; it has no budget.",)
    if spent + estimated > budget:
        raise InputError(
            f"tenant {job.tenant}: over budget: {money(spent)} of {money(budget)} is spent or promised this month, "
            f"the run is estimated at {money(estimated)}, {money(max(budget - spent, 0))} is left",
            "Wait for next month, make the job smaller, or ask who keeps the tenants file.",
        )
    sentences = [
        f"Tenant {job.tenant} has {money(budget - spent)} left of {money(budget)} this month ({money(spent)} is spent "
        f"or promised); after this run about {money(budget - spent - estimated)}."
    ]
    if tenant.store is None:
        sentences.append(
            f"Only what is published to {job.publish.to} is counted; give the tenant a store to count all."
        )
    if most_held(job)[1] and not account_for(job, tenant).gpus:
        sentences.append(f"hardware {job.hardware} has no GPU: the GPUs that the run holds are not priced.")
    return tuple(sentences)
