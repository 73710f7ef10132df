"""A store on S3, by boto3. Credentials and endpoint come from the environment, as for every AWS tool."""

import base64
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from cluster.errors import InputError, Unavailable
from cluster.storage import MissingKey, Store, Stored, checked_key, sha256_of

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LARGEST_SINGLE_PUT = 5 << 30  # S3's limit; more goes in parts
REFUSED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "NoSuchBucket",
    "InvalidBucketName",
    "403",
}
MISSING = {"NoSuchKey", "404", "NotFound"}
CONFLICT_TRIES = 5  # a 409 is undecided: ask again


class S3Store(Store):
    """See `Store`. `uri` is s3://bucket/prefix."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.bucket, _, self.prefix = uri.removeprefix("s3://").strip("/").partition("/")
        if not self.bucket:
            raise InputError(f"{uri}: names no bucket; write s3://bucket/prefix")

    def put(self, key: str, data: bytes | Path) -> Stored:
        """See `Store.put`. The server checks the sha256 before it takes the object."""
        sha256, size = sha256_of(data)
        with self._errors(key):
            if size > LARGEST_SINGLE_PUT:
                assert isinstance(data, Path), "so much is never held in memory"
                self._client.upload_file(str(data), self.bucket, self._full(key))
            elif isinstance(data, Path):
                with data.open("rb") as file:
                    self._put(key, file, sha256)
            else:
                self._put(key, data, sha256)
        return Stored(key=key, sha256=sha256, size=size)

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        with self._errors(key):
            return self._client.get_object(Bucket=self.bucket, Key=self._full(key))["Body"].read()

    def read(self, key: str, start: int, length: int) -> bytes:
        """See `Store.read`."""
        if not length:
            return b""
        with self._errors(key):
            found = self._client.get_object(
                Bucket=self.bucket, Key=self._full(key), Range=f"bytes={start}-{start + length - 1}"
            )
            data = found["Body"].read()
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
        """See `Store.copy`. boto3 copies in parts where one request does not do."""
        with self._errors(source):
            self._client.copy({"Bucket": self.bucket, "Key": self._full(source)}, self.bucket, self._full(target))

    def create(self, key: str, data: bytes) -> bool:
        """See `Store.create`. A reply may be lost: then the object is ours if it holds our bytes."""
        return self._conditional(key, data, {"IfNoneMatch": "*"})

    def get_tagged(self, key: str) -> tuple[bytes, str] | None:
        """See `Store.get_tagged`. The tag is the ETag."""
        try:
            with self._errors(key):
                found = self._client.get_object(Bucket=self.bucket, Key=self._full(key))
                return found["Body"].read(), found["ETag"]
        except MissingKey:
            return None

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """See `Store.swap`."""
        return self._conditional(key, data, {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag})

    def keys(self, prefix: str) -> Iterator[str]:
        """See `Store.keys`."""
        cut = len(f"{self.prefix}/") if self.prefix else 0
        full = f"{self.prefix}/{prefix}" if self.prefix else prefix
        with self._errors(prefix):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full):
                for entry in page.get("Contents", []):
                    yield entry["Key"][cut:]

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._errors(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._full(key))

    def check_writable(self) -> None:
        """See `Store.check_writable`. The bucket is looked for first: some servers make one of any name."""
        try:
            with self._errors(self.bucket):
                self._client.head_bucket(Bucket=self.bucket)
        except MissingKey as error:
            raise InputError(
                f"{self.uri}: there is no bucket {self.bucket}", "Create it, or choose another."
            ) from error
        key = f".probe-{uuid4().hex}"
        self.put(key, b"probe")
        try:
            if self.get(key) != b"probe":
                raise InputError(f"{self.uri}: what was written came back changed")
        finally:
            self.delete(key)

    def _put(self, key: str, body: Any, sha256: str, **conditions: Any) -> None:
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        self._client.put_object(
            Bucket=self.bucket, Key=self._full(key), Body=body, ChecksumSHA256=checksum, **conditions
        )

    def _conditional(self, key: str, data: bytes, condition: dict[str, str]) -> bool:
        sha256 = hashlib.sha256(data).hexdigest()
        for _ in range(CONFLICT_TRIES):
            try:
                with self._errors(key):
                    self._put(key, data, sha256, **condition)
                return True
            except _Lost:  # the condition did not hold – or our own earlier request did it and its reply was lost
                found = self.get_tagged(key)
                return found is not None and found[0] == data
            except _Undecided:
                continue
        raise Unavailable(f"{self.uri}: {key}: others keep writing it", "Run the same command again.")

    def _full(self, key: str) -> str:
        checked_key(key)
        return f"{self.prefix}/{key}" if self.prefix else key

    @property
    def _client(self) -> "S3Client":
        names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        return make_client(tuple(os.environ.get(name) for name in names))

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """boto3's errors as ours, naming the store and never a secret."""
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in MISSING:
                raise MissingKey(self.uri, key) from error
            if status == 412:
                raise _Lost from error
            if status == 409:
                raise _Undecided from error
            if code in REFUSED or status in (401, 403):
                raise InputError(
                    f"{self.uri}: the store refuses ({code})",
                    "Check the bucket's name and AWS_ACCESS_KEY_ID and its secret.",
                ) from error
            raise Unavailable(f"{self.uri}: {key}: {code or status}", "Run the same command again.") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise InputError(
                f"{self.uri}: no credentials", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            ) from error
        except BotoCoreError as error:
            raise Unavailable(
                f"{self.uri}: out of reach: {type(error).__name__}",
                "Check AWS_ENDPOINT_URL_S3 and the network; then run it again.",
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "bucket": self.bucket, "prefix": self.prefix}


@lru_cache(maxsize=8)
def make_client(environment: tuple[str | None, ...]) -> "S3Client":
    """One client per process and environment: making one takes a fifth of a second, and it may be shared by threads.

    Args:
        environment: what boto3 takes from the environment, so that a change of it gives another client.
    """
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 5},
        signature_version="s3v4",
        request_checksum_calculation="when_required",
        response_checksum_validation="when_supported",
        max_pool_connections=16,
    )
    region = os.environ.get("AWS_REGION", "us-east-1")
    return boto3.session.Session().client("s3", config=config, region_name=region)


class _Lost(Exception):
    """412: the condition did not hold."""


class _Undecided(Exception):
    """409: nobody knows yet."""
