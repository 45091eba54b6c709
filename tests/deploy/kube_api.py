"""The little of Kubernetes' API that vllm-router asks for: the pods of a namespace, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

NAMESPACE = "ai"


class KubeApi:
    """Lists pods, and tells each watcher of every change. No TLS, nobody is refused."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.port = 0
        self._labels = labels
        self._pods: dict[str, dict[str, Any]] = {}
        self._version = 1
        self._watchers: set[asyncio.StreamWriter] = set()

    def add(self, name: str, address: str) -> None:
        """A pod is ready."""
        self._pods[name] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "uid": name, "labels": self._labels},
            "spec": {"containers": []},
            "status": {
                "phase": "Running",
                "podIP": address,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }
        self._tell("ADDED", name)

    def remove(self, name: str) -> None:
        """A pod is to go, and is gone."""
        self._pods[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        self._pods[name]["status"]["conditions"][0]["status"] = "False"
        self._tell("MODIFIED", name)
        self._tell("DELETED", name)
        del self._pods[name]

    def kubeconfig(self, path: Path) -> None:
        """How a client finds it."""
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}
        user: dict[str, Any] = {"name": "u", "user": {}}
        config = {"apiVersion": "v1", "kind": "Config", "clusters": [cluster], "users": [user], "contexts": [context]}
        path.write_bytes(orjson.dumps(config | {"current-context": "c"}))

    def _tell(self, kind: str, name: str) -> None:
        self._version += 1
        self._pods[name]["metadata"]["resourceVersion"] = str(self._version)
        line = orjson.dumps({"type": kind, "object": self._pods[name]}) + b"\n"
        for watcher in self._watchers:
            watcher.write(b"%x\r\n%b\r\n" % (len(line), line))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                path = head.split()[1]
                if "watch=true" in path:
                    kept = b"transfer-encoding: chunked\r\n\r\n"
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + kept)
                    self._watchers.add(writer)
                    await reader.read()
                    return
                listed = {"apiVersion": "v1", "kind": "PodList", "items": list(self._pods.values())}
                body = orjson.dumps(listed | {"metadata": {"resourceVersion": str(self._version)}})
                length = b"content-length: %d\r\n\r\n" % len(body)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + length + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._watchers.discard(writer)
            writer.close()


@asynccontextmanager
async def kube_api(labels: dict[str, str]) -> AsyncIterator[KubeApi]:
    """It, on a free port; its pods have these labels."""
    api = KubeApi(labels)
    server = await asyncio.start_server(api._serve, "127.0.0.1", 0)
    api.port = server.sockets[0].getsockname()[1]
    try:
        yield api
    finally:
        server.close()
        for watcher in list(api._watchers):
            watcher.close()
