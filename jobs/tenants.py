"""The tenants file: who shares a cluster, what each may use and spend, and where its keys are kept. Never the keys.

Without a tenants file everything is allowed, and a job's tenant is only the label it is accounted under.
"""

import os
import re
from typing import Annotated, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from yaml import MarkedYAMLError

from cluster.credentials import Credentials
from cluster.errors import InputError
from cluster.hardware.profiles import load_profile
from cluster.paths import local_path
from cluster.storage import open_store
from cluster.strict import Strict
from cluster.yaml_files import LARGEST_FILE, load_yaml, read_text
from jobs.prefixes import parts, within
from workflows.recipe import Name, Share

VARIABLE = "KARIKOMI_TENANTS"
QUOTED = re.compile(r"'.*'")  # what YAML's errors show of a file
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TenantGates(Strict):
    """Gates of a tenant's jobs: the default where a job says nothing, the limit where it does."""

    perplexity_increase: Amount | None = Field(None, description="As in a job's gates.")
    worst_slice_increase: Amount | None = Field(None, description="As in a job's gates.")
    accuracy_drop: Share | None = Field(None, description="As in a job's gates; for classifiers.")
    worst_slice_drop: Share | None = Field(None, description="As in a job's gates; for classifiers.")
    may_loosen: bool = Field(False, description="Jobs may ask for looser gates; then these are only defaults.")


class Tenant(Strict):
    """One business unit on a shared installation."""

    business_unit: str = Field("", max_length=200, description="Whom usage is charged to; the tenant if not given.")
    members: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1, description='Users and schedules that may submit; "*" is everybody.'
    )
    prefixes: tuple[str, ...] = Field(min_length=1, description="s3:// prefixes and directories that it may use.")
    store: str | None = Field(
        None,
        description="The one store that its runs publish to, so that a budget sees all of them; any if not given.",
    )
    credentials: Credentials | None = Field(None, description="Where its keys are kept; none for directories.")
    gpus: Amount | None = Field(None, description="GPUs that its runs hold at once; no limit if not given.")
    cpus: Amount | None = Field(None, description="CPUs that its runs without GPUs hold at once.")
    monthly_budget_usd: Amount | None = Field(None, description="Money for a calendar month (UTC).")
    priority: int = Field(0, ge=-1000, le=1000, description="For Kueue on Kubernetes; Ray itself knows no priorities.")
    gates: TenantGates = Field(TenantGates(), description="Defaults and limits of its jobs' gates.")
    prices: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="US dollars an hour by hardware profile, instead of the profile's own."
    )

    @field_validator("prefixes")
    @classmethod
    def _prefixes_are_whole(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in value:
            if not prefix.startswith(("s3://", "file:///", "/")):
                raise ValueError(f"{prefix}: write s3://bucket/prefix or an absolute directory")
            if "*" in prefix or "?" in prefix:
                raise ValueError(f"{prefix}: a prefix is taken as it is written, without wildcards")
            try:
                parts(prefix)
            except InputError as error:
                raise ValueError(error.message) from error
        return value

    @field_validator("prices")
    @classmethod
    def _profiles_are_there(cls, value: dict[str, float]) -> dict[str, float]:
        for profile in value:
            try:
                load_profile(profile)
            except InputError as error:
                raise ValueError(error.message) from error
        return value

    @model_validator(mode="after")
    def _store_is_its_own(self) -> Self:
        try:
            if self.store is not None and not any(within(self.store, prefix) for prefix in self.prefixes):
                raise ValueError(f"store: {self.store} is outside of its prefixes")
        except InputError as error:
            raise ValueError(f"store: {error.message}") from error
        return self

    def quotas(self, name: str) -> dict[str, tuple[str, float]]:
        """Custom resources that hold its quotas: by "gpus" and "cpus", the resource's name and how much there is.

        The nodes where drivers run carry them; a run's driver takes what its run holds at most, as long as it lives.
        So Ray's own scheduler keeps the quota. With both kinds, CPUs have a resource of their own.
        """
        held = {}
        if self.gpus is not None:
            held["gpus"] = (f"tenant-{name}", self.gpus)
        if self.cpus is not None:
            held["cpus"] = (f"tenant-{name}" if self.gpus is None else f"tenant-{name}-cpus", self.cpus)
        return held

    def has_member(self, by: str) -> bool:
        """Whether user@host, or schedule:NAME (with or without what made it start), may submit for it."""
        return bool({"*", by.partition("@")[0], by.partition(" ")[0]} & set(self.members))


class Tenants(Strict):
    """All tenants by name."""

    tenants: dict[Name, Tenant] = Field(min_length=1, description="Tenants by the name that jobs give.")


def load_tenants(where: str | None = None) -> Tenants | None:
    """The tenants file at a path or s3:// address, or the one that KARIKOMI_TENANTS names; None when neither is given.

    Raises:
        InputError: it is missing or wrong; names tenant and field.
        Unavailable: its store is out of reach.
    """
    where = where or os.environ.get(VARIABLE)
    if not where:
        return None
    return parse_tenants(_text(where), where)


def parse_tenants(text: str, origin: str) -> Tenants:
    """The tenants in a YAML text; `origin` names it in errors. What was given is never shown: it may be a secret."""
    try:
        given = load_yaml(text, origin)
    except InputError as error:
        cause = error.__cause__
        if not isinstance(cause, MarkedYAMLError) or cause.problem_mark is None:
            raise
        problem = QUOTED.sub("…", cause.problem or "")
        raise InputError(f"{origin}: no valid YAML: line {cause.problem_mark.line + 1}: {problem}") from None
    if not isinstance(given, dict):
        raise InputError(f"{origin}: a tenants file is a mapping with the field tenants")
    try:
        return Tenants.model_validate(given)
    except ValidationError as error:
        hint = "An example: jobs/examples/tenants.yaml"
        raise InputError("\n".join(f"{origin}: {line}" for line in _lines(error)), hint) from error


def tenant_of(tenants: Tenants, name: str, by: str) -> Tenant:
    """A job's tenant, if whoever asks is one of its members.

    Raises:
        InputError: there is no such tenant, or it is not theirs; names those that are.
    """
    tenant = tenants.tenants.get(name)
    if tenant is None or not tenant.has_member(by):
        theirs = [one for one, other in tenants.tenants.items() if other.has_member(by)]
        what = "is no tenant here" if tenant is None else f"does not have {by} among its members"
        raise InputError(
            f"tenant: {name} {what}",
            f"Tenants of {by}: {', '.join(theirs) or 'none'}. Ask who keeps the tenants file to be let in.",
        )
    return tenant


def _text(where: str) -> str:
    way_out = f"Set {VARIABLE}, or --tenants, to where it is."
    if not where.startswith("s3://"):
        return read_text(local_path(where), "a tenants file")
    folder, _, name = where.rpartition("/")
    store = open_store(folder)
    size = store.size(name)
    if size is None:
        raise InputError(f"{where}: no tenants file is there", way_out)
    if size > LARGEST_FILE:
        raise InputError(f"{where}: larger than {LARGEST_FILE // 1024} KiB; a tenants file is short")
    try:
        return store.get(name).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: no UTF-8 text: byte {error.start}", way_out) from error


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors(include_input=False, include_url=False):
        field = ".".join(str(part) for part in problem["loc"] if part != "[key]") or "tenants"
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{field}: {'unknown field' if problem['type'] == 'extra_forbidden' else message}")
    return lines
