"""The store: reachable, writable, its conditions real, its checksums kept, its clock ours."""

import base64
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from cluster.directory_store import DirectoryStore
from cluster.errors import InputError, KarikomiError
from cluster.storage import Store, open_store
from jobs.checks.finding import Finding, fail, ok, warn

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

RACERS = 8
CLOCK_WARNS = 30.0  # seconds
CLOCK_REFUSES = 900.0  # S3 takes no request whose signature is older


def store(uri: str) -> list[Finding]:
    """All that is looked at in one store; everything written is removed again.

    Raises:
        InputError: this is no address of a store.
    """
    place = open_store(uri)
    findings = clock(uri) if uri.startswith("s3://") else []
    reached = writable(place)
    findings.append(reached)
    if reached.state == "fail":
        return findings
    folder = f".doctor-{uuid4().hex}"
    checks: list[Callable[[], Finding]] = [
        lambda: missing(place, f"{folder}/missing"),
        lambda: creates_once(place, f"{folder}/create"),
        lambda: swaps_by_tag(place, f"{folder}/swap"),
    ]
    if uri.startswith("s3://"):
        checks.append(lambda: checksums(place, f"{folder}/checksum"))
    try:
        for check in checks:
            findings.append(refused(check))
    finally:
        for key in ("create", "swap", "checksum"):
            with suppress(KarikomiError):
                place.delete(f"{folder}/{key}")
        if isinstance(place, DirectoryStore):
            shutil.rmtree(Path(place.uri) / folder, ignore_errors=True)  # with the lock of the swap
    return findings


def refused(check: Callable[[], Finding]) -> Finding:
    """A check's finding, or the store's own error as one."""
    try:
        return check()
    except KarikomiError as error:
        return fail("store", error.message, error.hint or "Look at the store's own log.")


def writable(place: Store) -> Finding:
    """Writes, reads and removes one object."""
    name = "store"
    try:
        place.check_writable()
    except KarikomiError as error:
        if "TimeTooSkewed" in error.message:
            return fail(name, error.message, "Set this machine's clock: timedatectl set-ntp true")
        return fail(name, error.message, error.hint or "Check the address and who may write there.")
    return ok(name, f"{place.uri} can be written, read and deleted from")


def missing(place: Store, key: str) -> Finding:
    """An object that is not there must be told as missing: runs ask so for what is done already."""
    name = "store, missing objects"
    try:
        size = place.size(key)
    except InputError as error:
        return fail(
            name,
            f"an object that is not there is answered by a refusal: {error.message}",
            "Allow this role s3:ListBucket (S3 tells who may not list 403 instead of 404). If a condition on s3:prefix "
            "is in the way, give each tenant a bucket of its own.",
        )
    if size is not None:
        return fail(name, f"an object that is not there has {size} bytes", "This is no store that can be relied upon.")
    return ok(name, "told as missing")


def creates_once(place: Store, key: str) -> Finding:
    """Several at once create one object: exactly one may succeed, and none afterwards."""
    name = "store, create once"
    with ThreadPoolExecutor(RACERS) as racers:
        won = list(racers.map(lambda number: place.create(key, f"{number}".encode()), range(RACERS)))
    later = place.create(key, b"later")
    if sum(won) != 1 or later:
        return fail(
            name,
            f"not conditional: {sum(won)} of {RACERS} racing writers created the same object"
            + (", and one did again when it was there" if later else ""),
            "If-None-Match is ignored, so two runs could publish one version. Use a server that honours it (S3, "
            "SeaweedFS, MinIO), and let no proxy strip request headers.",
        )
    if place.get(key) != f"{won.index(True)}".encode():
        return fail(name, "the object is not the winner's", "Conditions are checked, but not atomically; see above.")
    return ok(name, f"one of {RACERS} racing writers won, later ones were refused")


def swaps_by_tag(place: Store, key: str) -> Finding:
    """A write under the tag of what was there before must fail, one under the present tag succeed."""
    name = "store, compare and swap"
    way = "If-Match is ignored, so `latest` could move backwards. Use a server that honours it, without such a proxy."
    if not place.swap(key, b"first", None):
        return fail(name, "nothing was there, and it said that something is", way)
    held = place.get_tagged(key)
    if held is None or held[0] != b"first":
        return fail(name, "what was written is not there", "This is no store that can be relied upon.")
    if not place.swap(key, b"second", held[1]):
        return fail(name, "a swap under the present tag was refused", "Look for a proxy that changes ETags.")
    if place.swap(key, b"third", held[1]):
        return fail(name, "not conditional: a write under a stale tag succeeded", way)
    return ok(name, "a stale tag is refused")


def checksums(place: Store, key: str) -> Finding:
    """Whether the server checks a sha256 that comes with an object, and gives it back."""
    from botocore.exceptions import BotoCoreError, ClientError

    name = "store, checksums"
    if os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "").lower() == "when_required":
        return ok(
            name, "switched off by AWS_REQUEST_CHECKSUM_CALCULATION; objects are read back where they are verified"
        )
    data, (bucket, full) = b"checked", where(place, key)
    right = sha256_header(data)
    client = s3_client()
    try:
        client.put_object(Bucket=bucket, Key=full, Body=data, ChecksumSHA256=right)
        kept = client.head_object(Bucket=bucket, Key=full, ChecksumMode="ENABLED").get("ChecksumSHA256")
    except (ClientError, BotoCoreError) as error:
        return fail(
            name,
            f"an object with its sha256 is not taken: {error}",
            "export AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
        )
    try:
        client.put_object(Bucket=bucket, Key=full, Body=data, ChecksumSHA256=sha256_header(b"something else"))
        checked = False
    except (ClientError, BotoCoreError):
        checked = True
    if kept != right or not checked:
        lacks = " and ".join(
            words for lacking, words in ((kept != right, "not kept"), (not checked, "not checked")) if lacking
        )
        return warn(
            name,
            f"a sha256 that comes with an object is {lacks}; it is read back instead, which takes longer",
            "Nothing must be done. A server that keeps them (S3, SeaweedFS) verifies releases faster.",
        )
    return ok(name, "checked by the server and kept with the object")


def clock(uri: str) -> list[Finding]:
    """The store's clock against ours, by the Date header that every answer has, refusals too."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket = uri.removeprefix("s3://").partition("/")[0]
    before = time.time()
    try:
        answer: Any = s3_client().head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except (BotoCoreError, KarikomiError):
        return []  # out of reach: the next check says so
    after = time.time()
    said = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    if not said:
        return []
    # the header counts whole seconds, cut off: its true time is half a second later on average
    return [clock_of(parsedate_to_datetime(said).timestamp() + 0.5 - (before + after) / 2)]


def clock_of(ahead: float) -> Finding:
    """The difference in words; `ahead` is how many seconds the store's clock is before ours."""
    name, way = "clock", "Set this machine's clock: timedatectl set-ntp true"
    text = f"{abs(ahead):.0f} s {'behind' if ahead > 0 else 'ahead of'} the store's"
    if abs(ahead) > CLOCK_REFUSES:
        return fail(name, f"{text}; S3 refuses requests at {CLOCK_REFUSES / 60:.0f} minutes", way)
    if abs(ahead) > CLOCK_WARNS:
        return warn(name, f"{text}; S3 refuses requests at {CLOCK_REFUSES / 60:.0f} minutes", way)
    return ok(name, "within a few seconds of the store's" if abs(ahead) < 5 else text)


def s3_client() -> "S3Client":
    """The client that the environment asks for, beside the store's own."""
    from cluster.s3_store import make_client

    return make_client(os.getpid(), hash(frozenset(one for one in os.environ.items() if one[0].startswith("AWS_"))))


def where(place: Store, key: str) -> tuple[str, str]:
    """Bucket and whole key of an object in a store on S3."""
    bucket, _, prefix = place.uri.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/{key}" if prefix else key


def sha256_header(data: bytes) -> str:
    """A sha256 as S3 writes it."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
