"""A real S3 server process on loopback, which tests kill and start again."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
import s3fs
from botocore.config import Config

from packspeed.launch.config.ports import free_port

# The environment of a client; AWS_ENDPOINT_URL is the server's `url`.
AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """moto's S3 server. It keeps objects in memory, so after a restart the files of `folder` are uploaded again."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder  # its files are uploaded to s3://bucket/tokens at each start
        self.port = free_port()
        # fsspec keeps clients by their arguments, without the environment: one of an earlier test has a dead address.
        s3fs.S3FileSystem.clear_instance_cache()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def command(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def start(self) -> None:
        self.process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                break
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.05)
        self.upload()

    def upload(self) -> None:
        store = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", config=Config(retries={"total_max_attempts": 10})
        )
        store.create_bucket(Bucket="bucket")
        for path in self.folder.iterdir() if self.folder else ():
            store.put_object(Bucket="bucket", Key=f"tokens/{path.name}", Body=path.read_bytes())
        store.close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
