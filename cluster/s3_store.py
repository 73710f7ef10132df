"""A store on S3, by boto3. Credentials and endpoint come from the environment, as for every AWS tool.

Older S3-compatible servers that know no checksums: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required; objects are
then read back where they are verified.
"""

import base64
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
)

from cluster.errors import InputError, Unavailable
from cluster.storage import Entry, Leftover, MissingKey, Store, Stored, checked_key, sha256_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CopySourceTypeDef

LARGEST_SINGLE_PUT = 5 << 30  # S3's limit for one request, copies included; more goes in parts
PART = 64 << 20
REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket", "InvalidBucketName"}
MISSING = {"NoSuchKey", "404", "NotFound", "NoSuchUpload"}
CUT_OFF = (IncompleteReadError, ResponseStreamingError, ReadTimeoutError, FlexibleChecksumError)
PAUSES = (0.2, 1.0, 3.0)  # seconds before asking again what boto3 itself does not retry
WRITER = "karikomi-writer"  # metadata of a conditional write: whose it is


class S3Store(Store):
    """See `Store`. `uri` is s3://bucket/prefix."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.bucket, _, self.prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        if not self.bucket:
            raise InputError(f"{uri}: names no bucket; write s3://bucket/prefix")
        if self.prefix:
            checked_key(self.prefix)

    def put(self, key: str, data: bytes | Path) -> Stored:
        """See `Store.put`. The server checks the sha256 before it takes the object."""
        sha256, size = sha256_of(data)
        with self._errors(key):
            if isinstance(data, bytes):
                self._put(key, data, sha256)
            else:
                with data.open("rb") as file:
                    if size > LARGEST_SINGLE_PUT:
                        extra = {"ChecksumAlgorithm": "SHA256"} if self._checksums else {}
                        parts = TransferConfig(multipart_chunksize=PART, max_concurrency=4)
                        self._client.upload_fileobj(file, self.bucket, self._full(key), ExtraArgs=extra, Config=parts)
                    else:
                        self._put(key, file, sha256)
        return Stored(key=key, sha256=sha256, size=size)

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        return self._body(key)[0]

    def read(self, key: str, start: int, length: int) -> bytes:
        """See `Store.read`."""
        if not length:
            return b""
        data, _ = self._body(key, Range=f"bytes={start}-{start + length - 1}")
        if len(data) != length:
            raise Unavailable(f"{self.uri}: {key}: {len(data)} bytes from {start}, not {length}: it is cut short")
        return data

    def size(self, key: str) -> int | None:
        """See `Store.size`."""
        try:
            with self._errors(key):
                return self._client.head_object(Bucket=self.bucket, Key=self._full(key))["ContentLength"]
        except MissingKey:
            return None

    def copy(self, source: str, target: str) -> None:
        """See `Store.copy`. In one request where it can be: only then the server keeps the object's sha256."""
        parts = TransferConfig(multipart_threshold=LARGEST_SINGLE_PUT + 1, multipart_chunksize=PART * 8)
        origin: CopySourceTypeDef = {"Bucket": self.bucket, "Key": self._full(source)}
        with self._errors(source):
            self._client.copy(origin, self.bucket, self._full(target), Config=parts)

    def verify(self, stored: Stored) -> bool:
        """See `Store.verify`. By the server's own sha256 of the whole object, if it has one; else read back."""
        try:
            with self._errors(stored.key):
                found = self._client.head_object(Bucket=self.bucket, Key=self._full(stored.key), ChecksumMode="ENABLED")
        except MissingKey:
            return False
        sha256 = found.get("ChecksumSHA256", "")
        if not sha256 or "-" in sha256 or found.get("ChecksumType") == "COMPOSITE":  # a digest of parts' digests
            return super().verify(stored)
        return (found["ContentLength"], sha256) == (stored.size, _base64(stored.sha256))

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`."""
        return self._conditional(key, data, {"IfNoneMatch": "*"})

    def get_tagged(self, key: str) -> tuple[bytes, str] | None:
        """See `Store.get_tagged`. The tag is the ETag."""
        try:
            return self._body(key)
        except MissingKey:
            return None

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """See `Store.swap`."""
        return self._conditional(key, data, {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag})

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store.keys`."""
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """See `Store.entries`. Put in order here: some servers list by folders."""
        cut = len(f"{self.prefix}/") if self.prefix else 0
        full = f"{self.prefix}/{prefix}" if self.prefix else prefix
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full)
            found = [
                Entry(key=one["Key"][cut:], size=one["Size"], modified=one["LastModified"])
                for page in pages
                for one in page.get("Contents", [])
                if one["Key"][cut:] and not one["Key"].endswith("/")  # consoles mark "folders" so
            ]
        return iter(sorted(found, key=lambda entry: entry.key))

    def clock(self) -> datetime:
        """See `Store.clock`. The time at which the server answers."""
        with self._errors(self.bucket):
            answer = self._client.head_bucket(Bucket=self.bucket)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).astimezone(UTC)

    def leftovers(self) -> list[Leftover]:
        """See `Store.leftovers`. The sizes of uploads are not told without a request for each."""
        cut = len(f"{self.prefix}/") if self.prefix else 0
        with self._errors(self.prefix):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=f"{self.prefix}/" if self.prefix else ""
            )
            return [
                Leftover(key=one["Key"][cut:], upload=one["UploadId"], size=None, began=one["Initiated"])
                for page in pages
                for one in page.get("Uploads", [])
            ]

    def drop(self, leftover: Leftover) -> None:
        """See `Store.drop`."""
        try:
            with self._errors(leftover.key):
                self._client.abort_multipart_upload(
                    Bucket=self.bucket, Key=self._full(leftover.key), UploadId=leftover.upload
                )
        except MissingKey:
            return

    def folders(self, prefix: str) -> list[str]:
        """See `Store.folders`."""
        full = f"{self._full(prefix.removesuffix('/'))}/"
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=full, Delimiter="/"
            )
            found = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", [])]
        return sorted(one.removeprefix(full).removesuffix("/") for one in found)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._errors(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._full(key))

    def check_writable(self) -> None:
        """See `Store.check_writable`. The bucket is looked for first: some servers make one of any name."""
        with self._errors(self.bucket):
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if _status(error) == 404:
                    raise InputError(
                        f"{self.uri}: there is no bucket {self.bucket}", "Create it, or choose another."
                    ) from error
                if _status(error) != 403:  # a tenant may be kept from asking: then the probe decides
                    raise
        key = f".probe-{uuid4().hex}"
        self.put(key, b"probe")
        try:
            if self.get(key) != b"probe":
                raise InputError(f"{self.uri}: what was written came back changed")
        finally:
            self.delete(key)

    def _put(self, key: str, body: Any, sha256: str, **more: Any) -> None:
        if self._checksums:
            more["ChecksumSHA256"] = _base64(sha256)
        self._client.put_object(Bucket=self.bucket, Key=self._full(key), Body=body, **more)

    def _body(self, key: str, **part: Any) -> tuple[bytes, str]:
        """An object or a part of it, whole, and its ETag. boto3 retries requests, but not a body that breaks off."""
        with self._errors(key):
            for pause in (*PAUSES, None):
                found = self._client.get_object(Bucket=self.bucket, Key=self._full(key), **part)
                try:
                    return found["Body"].read(), found["ETag"]
                except CUT_OFF:
                    if pause is None:
                        raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _conditional(self, key: str, data: bytes, condition: dict[str, str]) -> bool:
        """Writes under a condition, once.

        When the reply to a write that succeeded is lost, boto3 asks again and is told that the condition fails. So
        every write carries a name of its own, and after a failed condition the object is asked whose it is.
        """
        writer = uuid4().hex
        sha256, _ = sha256_of(data)
        with self._errors(key):
            for pause in (*PAUSES, None):
                try:
                    self._put(key, data, sha256, Metadata={WRITER: writer}, **condition)
                    return True
                except ClientError as error:
                    if _status(error) == 412 or _code(error) in MISSING:  # the latter: If-Match, and nothing is there
                        return self._writer(key) == writer
                    if _status(error) != 409:
                        raise
                if pause is not None:  # 409 is undecided: ask again
                    time.sleep(pause)
        raise Unavailable(f"{self.uri}: {key}: others keep writing it", "Run the same command again.")

    def _writer(self, key: str) -> str | None:
        try:
            with self._errors(key):
                found = self._client.head_object(Bucket=self.bucket, Key=self._full(key))
        except MissingKey:
            return None
        return found["Metadata"].get(WRITER)

    def _full(self, key: str) -> str:
        checked_key(key)
        return f"{self.prefix}/{key}" if self.prefix else key

    @property
    def _client(self) -> "S3Client":
        settings = hash(frozenset(one for one in os.environ.items() if one[0].startswith("AWS_")))
        return make_client(os.getpid(), settings)

    @property
    def _checksums(self) -> bool:
        """Whether the server is sent sha256s to check: yes, unless the environment asks for few checksums."""
        return self._client.meta.config.request_checksum_calculation != "when_required"  # type: ignore[attr-defined]

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """boto3's errors as ours, naming the store and never a secret."""
        try:
            yield
        except ClientError as error:
            code, status = _code(error), _status(error)
            if code in MISSING:
                raise MissingKey(self.uri, key) from error
            if code in REFUSED or status in (301, 401, 403):
                raise InputError(
                    f"{self.uri}: the store refuses ({code})",
                    "Check the bucket's name and region, and AWS_ACCESS_KEY_ID and its secret.",
                ) from error
            raise Unavailable(f"{self.uri}: {key}: {code or status}", "Run the same command again.") from error
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise InputError(
                f"{self.uri}: no credentials", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from error
        except ParamValidationError as error:
            raise InputError(f"{self.uri}: {error}") from error
        except BotoCoreError as error:
            raise Unavailable(
                f"{self.uri}: out of reach: {type(error).__name__}",
                "Check AWS_ENDPOINT_URL_S3 and the network; then run it again.",
            ) from error


@lru_cache(maxsize=16)
def make_client(process: int, settings: int) -> "S3Client":
    """One client for all stores of a process: making one takes some tenths of a second. It is safe among threads.

    Args:
        process: connections do not survive a fork.
        settings: hash of the AWS_ variables that boto3 reads; others give another client.
    """
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 4},
        signature_version="s3v4",
        max_pool_connections=16,
    )
    # A session of its own: boto3's default one is not safe to share between threads.
    try:
        session = boto3.session.Session()
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
        return session.client("s3", config=config, region_name=region)
    except ValueError as error:
        raise InputError(f"AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL: {error}") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _base64(sha256: str) -> str:
    """A hexadecimal digest as S3 writes it."""
    return base64.b64encode(bytes.fromhex(sha256)).decode()
