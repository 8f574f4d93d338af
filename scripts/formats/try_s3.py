"""Open checkpoints in a bucket of a local S3 server by headers and ranges, count what is fetched, and write some there.

Run it where the packages are installed; they are too heavy for the tests:

    pip install "moto[server]" s3fs boto3 && python scripts/formats/try_s3.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import aiobotocore.client
import boto3
import botocore.exceptions
import torch
from moto.server import ThreadedMotoServer

import ckptsurgery as cs
from ckptsurgery.storage.sources.remote import RemoteSource

STATE = {f"layers.{n}.w": torch.randn(64, 1024, generator=torch.Generator().manual_seed(n)) for n in range(100)}


def fetched(checkpoint: cs.Checkpoint) -> int:
    """Bytes that a checkpoint's sources have fetched, after their first requests."""
    return sum(source.fetched for source in checkpoint.sources.values() if isinstance(source, RemoteSource))


def write(client: Any) -> None:
    """Save at addresses, and have the server fail at every request of an upload in turn."""
    cs.save(STATE, "s3://bucket/written/x.safetensors")
    cs.save(STATE, "s3://bucket/written/shards", max_shard_size="6MB")
    for address in ("s3://bucket/written/x.safetensors", "s3://bucket/written/shards"):
        with cs.open(address) as checkpoint:
            assert all(torch.equal(checkpoint[key].load(), tensor) for key, tensor in STATE.items())
    failures, original = 0, aiobotocore.client.AioBaseClient._make_api_call
    for at in range(1000):
        calls = 0

        async def failing(self: Any, name: str, arguments: Any, at: int = at) -> Any:
            nonlocal calls
            if name in ("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "PutObject"):
                calls += 1
                if calls == at + 1:
                    answer = {"Error": {"Code": "AccessDenied", "Message": "not any more"}}
                    raise botocore.exceptions.ClientError(answer, name)
            return await original(self, name, arguments)

        aiobotocore.client.AioBaseClient._make_api_call = failing
        try:
            cs.save(STATE, "s3://bucket/broken", max_shard_size="6MB")
        except cs.CheckpointError:
            failures += 1
        finally:
            aiobotocore.client.AioBaseClient._make_api_call = original
        held = client.list_objects_v2(Bucket="bucket", Prefix="broken").get("KeyCount", 0)
        pending = len(client.list_multipart_uploads(Bucket="bucket").get("Uploads", []))
        if failures <= at:
            break
        assert held == pending == 0, (at, held, pending)
    print(f"written; {failures} failures, one at each request of an upload, left no object and no multipart upload")


def main() -> None:
    """Write a bucket, open what is in it, and compare."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cs.save(STATE, folder / "x.safetensors")
        cs.save(STATE, folder / "x.pt")
        cs.save(STATE, folder / "shards", max_shard_size="6MB")
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bucket", path.relative_to(folder).as_posix())
    for address in ("s3://bucket/x.safetensors", "s3://bucket/x.pt", "s3://bucket/shards"):
        with cs.open(address) as checkpoint:
            opened = fetched(checkpoint)
            assert set(checkpoint) == set(STATE)
            assert torch.equal(checkpoint["layers.7.w"].load(), STATE["layers.7.w"])
            needed = STATE["layers.7.w"].nbytes
            print(f"{address}: {opened:,} bytes to open, {fetched(checkpoint) - opened:,} for {needed:,} of a tensor")
    with cs.open("s3://bucket/x.safetensors") as checkpoint:
        client.put_object(Bucket="bucket", Key="x.safetensors", Body=b"another file")
        try:
            checkpoint["layers.0.w"].load()
        except cs.CheckpointError as error:
            print(error.diagnostics[0].code)
    try:
        cs.open("s3://bucket/nothing.safetensors")
    except cs.CheckpointError as error:
        print(error.diagnostics[0].code)
    write(client)
    server.stop()


if __name__ == "__main__":
    main()
