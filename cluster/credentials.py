"""A tenant's own keys, taken up on the machine that keeps them.

Ray shows a job's environment to everybody on the cluster, so a secret never travels: only the name of where it is
kept does (`KARIKOMI_CREDENTIALS=environment:RETAIL`), and the driver and each of its workers look it up where they
run. A worker without them reads and writes nothing, rather than as somebody else. One Ray cluster is one trust domain
all the same: the variables of all tenants are on its machines.
"""

import hashlib
import os
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import InputError
from cluster.paths import cache_directory

VARIABLE = "KARIKOMI_CREDENTIALS"
HOOK = "cluster.credentials.adopt_in_worker"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
TOKEN = "AWS_SESSION_TOKEN"
POD = "AWS_WEB_IDENTITY_TOKEN_FILE"  # Kubernetes puts a service account's token there
CONTAINER = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
IDENTITIES = (*KEYS, TOKEN, "AWS_PROFILE", "AWS_ROLE_ARN")  # what else would say who a process is
LITERAL = re.compile(r"key|secret|token|password", re.IGNORECASE)  # names of fields that would hold one
KEY_ID = re.compile(r"A[KS]IA[A-Z0-9]{16}")  # what the id of an AWS key looks like


class Credentials(BaseModel):
    """Where a tenant's keys to the store are kept: exactly one of three ways, never the keys themselves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    environment: str | None = Field(
        None,
        pattern=r"^[A-Z][A-Z0-9_]{0,62}$",
        description="RETAIL: the machines have RETAIL_AWS_ACCESS_KEY_ID and RETAIL_AWS_SECRET_ACCESS_KEY.",
    )
    role: str | None = Field(
        None,
        pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+$",
        description="A role that the machines may assume as what they are: instance, container or pod.",
    )
    profile: str | None = Field(
        None, pattern=r"^[\w.-]{1,64}$", description="A profile in the machines' AWS configuration."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_keys(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, value in given.items():
                literal = name not in cls.model_fields and LITERAL.search(str(name))
                if literal or (isinstance(value, str) and KEY_ID.fullmatch(value)):
                    raise ValueError(
                        f"{name}: a key itself must not be in this file; put it into the machines' environment as "
                        "NAME_AWS_ACCESS_KEY_ID and NAME_AWS_SECRET_ACCESS_KEY and write environment: NAME"
                    )
        return given

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give exactly one of environment, role, profile")
        return self

    @property
    def name(self) -> str:
        """How it is named to drivers and workers: environment:RETAIL, role:arn:…, profile:retail."""
        ((way, value),) = self.model_dump(exclude_none=True).items()
        return f"{way}:{value}"


def adopt(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Makes this process the tenant that `KARIKOMI_CREDENTIALS` names; False when it names none.

    Every AWS tool in the process and in its children then acts as that tenant.

    Raises:
        InputError: this machine does not have them; names the variable.
    """
    name = environment.get(VARIABLE, "")
    if not name:
        return False
    way, _, value = name.partition(":")
    try:
        found = Credentials.model_validate({way: value})
    except ValidationError as error:
        raise InputError(
            f"{VARIABLE}: names no credentials", "Write environment:NAME, role:ARN or profile:NAME."
        ) from error
    if found.environment:
        _become(environment, _keys_of(found.environment, environment))
    elif found.role:
        _become(environment, _role(found.role, environment))
    elif found.profile:
        _become(environment, {"AWS_PROFILE": found.profile})
    return True


def adopt_in_worker() -> None:
    """What Ray calls first in each worker process.

    An error here would make Ray start workers for ever. So a worker without the tenant's keys gets a profile that is
    not there: its first request is refused before it is sent, by an error that names the missing variable.
    """
    try:
        adopt()
    except InputError as error:
        print(error, file=sys.stderr)
        _become(os.environ, {"AWS_PROFILE": f"({error.message})"})


def for_workers(environment: MutableMapping[str, str] = os.environ) -> dict[str, Any]:
    """The part of Ray's runtime environment by which workers adopt what their driver has; empty when it has nothing."""
    if VARIABLE not in environment:
        return {}
    return {"worker_process_setup_hook": HOOK, "env_vars": {VARIABLE: environment[VARIABLE]}}


def _keys_of(name: str, environment: MutableMapping[str, str]) -> dict[str, str]:
    missing = [f"{name}_{key}" for key in KEYS if not environment.get(f"{name}_{key}")]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} not set on this machine",
            "Set the tenant's keys in the environment of the cluster's machines (not of the job), or ask who runs it.",
        )
    return {key: environment[f"{name}_{key}"] for key in (*KEYS, TOKEN) if f"{name}_{key}" in environment}


def _role(role: str, environment: MutableMapping[str, str]) -> dict[str, str]:
    """A pod assumes by its token; an instance or container by a configuration file, which holds no secret."""
    if environment.get(POD):
        return {"AWS_ROLE_ARN": role}
    if environment.get(KEYS[0]):
        raise InputError(
            f"{role} is assumed by what a machine is, but this one has {KEYS[0]}, which boto3 would use instead",
            "Take the key out of the machine's environment, or use credentials.profile with a source profile.",
        )
    source = "EcsContainer" if any(environment.get(one) for one in CONTAINER) else "Ec2InstanceMetadata"
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "us-east-1"  # to ask STS in
    content = f"[profile karikomi]\nrole_arn = {role}\ncredential_source = {source}\nregion = {region}\n"
    file = cache_directory() / f"role-{hashlib.sha256(content.encode()).hexdigest()[:12]}.ini"
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")
    written.write_text(content)
    written.replace(file)
    return {"AWS_CONFIG_FILE": str(file), "AWS_PROFILE": "karikomi"}


def _become(environment: MutableMapping[str, str], identity: dict[str, str]) -> None:
    """Replaces whoever the process was; nothing of that is left for boto3 to fall back to."""
    for name in IDENTITIES:
        environment.pop(name, None)
    environment.update(identity)
