"""Tenants of a hub: tokens that are limited to a namespace, and raw requests of the API of the Hugging Face Hub."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests


class Tenant:
    """An account whose token may write in the namespace of its name, or has another role there; `hub` is running."""

    def __init__(self, hub: Any, name: str, role: str = "write") -> None:
        self.hub, self.name = hub, name
        self.token = hub.make_token(name, role, namespaces=(name,))

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """An answer; redirects are not followed."""
        headers = {"authorization": f"Bearer {self.token}", **options.pop("headers", {})}
        return requests.request(method, self.hub.url + path, headers=headers, timeout=60, allow_redirects=False, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """The answer to a GET request."""
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        """The answer to a POST request."""
        return self.request("POST", path, **options)

    def create(self, repository: str, *, private: bool = False) -> None:
        """Create a repository in its namespace."""
        document = {"name": repository, "organization": self.name, "type": "model", "private": private}
        self.post("/api/repos/create", json=document).raise_for_status()

    def commit(self, repository: str, files: Mapping[str, bytes]) -> requests.Response:
        """Commit files to `main`."""
        lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "change"}}]
        lines += [
            {"key": "file", "value": {"path": path, "content": base64.b64encode(data).decode()}} for path, data in files.items()
        ]
        return self.send(repository, "\n".join(map(json.dumps, lines)).encode())

    def send(self, repository: str, body: Any) -> requests.Response:
        """Send the body of a commit to `main`."""
        return self.post(f"/api/models/{self.name}/{repository}/commit/main", data=body)

    def upload(self, repository: str, folder: Path) -> requests.Response:
        """Commit the files of a folder."""
        return self.commit(repository, {path.name: path.read_bytes() for path in sorted(folder.iterdir())})
