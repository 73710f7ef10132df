"""Whether an address lies below one of a tenant's prefixes: whole path parts, nothing that climbs. Pure.

The store's own credentials are what really keeps tenants apart; this says so earlier and more clearly.
"""

from collections.abc import Iterator, Sequence
from urllib.parse import unquote

from cluster.errors import InputError
from cluster.hardware.profiles import is_file
from cluster.paths import is_there, local_path
from jobs.job import Job
from workflows.models.source import HUB_ID

BUILTIN = "builtin:"


def within(address: str, prefix: str) -> bool:
    """Whether an address is a prefix or lies below it, by whole parts: s3://b/retail does not admit s3://b/retail-evil.

    Raises:
        InputError: one of them cannot be followed safely.
    """
    one, other = parts(address), parts(prefix)
    return one[: len(other)] == other


def parts(address: str) -> tuple[str, ...]:
    """The parts of an address, the kind of store first; a directory's links are followed.

    Raises:
        InputError: another kind of address, or one with empty parts, "." or "..".
    """
    if address.startswith("s3://"):
        kind, path = "s3", address.removeprefix("s3://").removesuffix("/")
        found = path.split("/")
    elif "://" in address and not address.startswith("file:///"):
        raise InputError(f"{address}: no kind of store; write s3://bucket/prefix or a directory")
    else:
        kind = "directory"
        plain = local_path(unquote(address.removeprefix("file://")) if address.startswith("file:") else address)
        if ".." in plain.parts or "\0" in str(plain):
            raise InputError(f"{address}: an address has no '..'")
        found = list(plain.resolve().parts)
    if not all(found) or {".", ".."} & set(found) or any("\0" in one or "\\" in one for one in found):
        raise InputError(f"{address}: an address has no empty parts, no '.', '..' or backslashes")
    return (kind, *found)


def addresses(job: Job) -> Iterator[tuple[str, str]]:
    """(field, address) of all that a job reads and writes; hub models and built-in text belong to nobody."""
    if job.model.startswith("s3://") or is_there(local_path(job.model)) or not HUB_ID.fullmatch(job.model):
        yield "model", job.model
    for role in ("calibration", "tuning", "evaluation"):
        source = getattr(job.data, role).source
        if not source.startswith(BUILTIN):
            yield f"data.{role}.source", source
    if is_file(job.hardware):
        yield "hardware", job.hardware
    yield "publish.to", job.publish.to


def check(job: Job, prefixes: Sequence[str], tenant: str) -> None:
    """Refuses a job that reads or writes outside its tenant's prefixes.

    Raises:
        InputError: names the field and the prefixes.
    """
    for field, address in addresses(job):
        try:
            inside = any(within(address, prefix) for prefix in prefixes)
        except InputError as error:
            raise InputError(f"{field}: {error.message}") from error
        if not inside:
            raise InputError(
                f"{field}: {address} is outside of tenant {tenant}'s prefixes: {', '.join(prefixes)}",
                "Move it there, or ask who keeps the tenants file.",
            )
