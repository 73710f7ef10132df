"""What a run is charged at: fixed when an attempt begins, so that a later price changes no past month."""

import os
from collections.abc import Mapping

from pydantic import Field, ValidationError

from cluster.errors import InputError
from cluster.hardware.profiles import load_profile
from jobs.job import Job
from jobs.records import Record, Usage
from jobs.tenants import Tenant, load_tenants

VARIABLE = "KARIKOMI_ACCOUNT"
SECONDS_PER_HOUR = 3600


class Account(Record):
    """Whom an attempt is charged to, and at what price; kept beside the attempt's other records."""

    business_unit: str
    hardware: str = Field(description="Profile whose machine is priced.")
    cores: int = Field(ge=1)
    gpus: int = Field(ge=0)
    usd_per_hour: float = Field(ge=0, description="Of one whole machine of the profile.")
    estimated_usd: float = Field(0.0, ge=0, description="What the run was let in for; 0 when nobody estimated it.")

    def dollars(self, usage: Usage) -> float:
        """Price of what was held.

        A machine is paid for in the share of its scarcest part that was held: GPU-seconds of its GPUs, or CPU-seconds
        of its cores, whichever is more. Memory is not counted.
        """
        machines = usage.cpu_seconds / self.cores
        if self.gpus:
            machines = max(machines, usage.gpu_seconds / self.gpus)
        return machines * self.usd_per_hour / SECONDS_PER_HOUR


def money(dollars: float) -> str:
    """US dollars for a person: cents, and parts of them where there is less than ten."""
    return f"${dollars:,.2f}" if not dollars or abs(dollars) >= 0.1 else f"${dollars:,.4f}"


def account_for(job: Job, tenant: Tenant | None, estimated_usd: float = 0.0) -> Account:
    """A job's account: the tenant's price where it has one, else the profile's.

    Raises:
        InputError: there is no such hardware profile.
    """
    profile = load_profile(job.hardware)
    prices = tenant.prices if tenant else {}
    return Account(
        business_unit=(tenant.business_unit if tenant else "") or job.tenant,
        hardware=profile.name,
        cores=profile.cores,
        gpus=profile.gpus,
        usd_per_hour=prices.get(job.hardware, profile.price_per_hour_usd),
        estimated_usd=estimated_usd,
    )


def account_here(job: Job, environment: Mapping[str, str] = os.environ) -> Account:
    """The account that a run was let in with, which its driver is told; else by the tenants file, if one is named.

    Raises:
        InputError: the variable, the tenants file or the hardware profile is wrong.
    """
    if told := environment.get(VARIABLE):
        try:
            return Account.model_validate_json(told)
        except ValidationError as error:
            raise InputError(
                f"{VARIABLE}: holds no account", "It is set by `karikomi submit`; leave it to it."
            ) from error
    tenants = load_tenants()
    return account_for(job, tenants.tenants.get(job.tenant) if tenants else None)
