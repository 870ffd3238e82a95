"""Images of deploy/Dockerfile that buildah builds, and containers of them as Docker starts those of the compose files.

Their base is Docker Hub's where that can be reached, else Debian's Python of the same version, in the same Debian. It stands in
for vLLM's image, of many gigabytes for GPUs: what is shown of that target is what the Dockerfile adds to it. The programs
that start containers want more of the kernel than most test machines give them, so a namespace for mounts and `chroot` do here:
a read-only root, volumes with the owner that their folder has in the image, and the image's user, who has no capability.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, missing, need_program
from tests.support.environments import debian_python

_BASE = "docker.io/library/python:3.13-slim"
_VLLM_BASE = "docker.io/vllm/vllm-openai:v0.33.0"
_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
_START = """
set -e
mount --bind "$IMAGE" "$IMAGE"
for path in dev proc etc/hosts etc/resolv.conf; do mount --bind "/$path" "$IMAGE/$path"; done
mount -t tmpfs none "$IMAGE/tmp"
for pair in $MOUNTS; do mount --bind "${pair%%:*}" "$IMAGE${pair#*:}"; done
mount -o remount,bind,ro "$IMAGE"
exec chroot --userspec="$USER" --groups= "$IMAGE" env -i $ENVIRON "$@"
"""


@dataclass(frozen=True)
class Image:
    """An image that was built.

    Attributes:
        root: Its files, those of a container that buildah keeps.
        config: As Docker has it, with `Entrypoint`, `User`, `Healthcheck` and more.
        folder: For the volumes of its containers.
    """

    root: Path
    config: Mapping[str, Any]
    folder: Path

    @contextmanager
    def container(self, *words: object, mounts: Mapping[str, Path] | None = None) -> Iterator[subprocess.Popen[str]]:
        """Start `words` in a container, with these files beside the volumes; its output is one pipe."""
        process = self._started(words, mounts or {})
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.communicate(timeout=40)
            finally:
                process.kill()

    def health(self, port: int) -> int:
        """Run the check of health in the image, for a server at this port instead of the image's, and return its exit code."""
        (own_port,) = self.config["ExposedPorts"]
        kind, *words = self.config["Healthcheck"]["Test"]
        assert kind == "CMD"
        assert own_port.removesuffix("/tcp") in words[-1]
        return self._started([word.replace(own_port.removesuffix("/tcp"), str(port)) for word in words], {}).wait(60)

    def _started(self, words: object, mounts: Mapping[str, Path]) -> subprocess.Popen[str]:
        pairs = [f"{self._volume(path)}:{path}" for path in self.config["Volumes"] or ()]
        for path, source in mounts.items():
            target = self.root / path[1:]
            target.mkdir(exist_ok=True) if source.is_dir() else target.touch()
            pairs.append(f"{source}:{path}")
        user = self.config["User"] or "0"
        settings = {"IMAGE": self.root, "MOUNTS": " ".join(pairs), "USER": f"{user}:{user}"}
        environ = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        environ["ENVIRON"] = " ".join([*self.config["Env"], f"HOME={self.config['WorkingDir'] or '/'}"])
        command = ["unshare", "--mount", "sh", "-c", _START, "sh", *map(str, words)]  # type: ignore[call-overload]
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def _volume(self, path: str) -> Path:
        """Return the folder of a volume, made with the owner that its folder in the image has."""
        folder, owner = self.folder / path[1:].replace("/", "-"), (self.root / path[1:]).stat()
        if not folder.exists():
            folder.mkdir(parents=True)
            os.chown(folder, owner.st_uid, owner.st_gid)
        return folder


@dataclass
class Builder:
    """buildah, with a storage of its own that needs neither a kernel's help nor a daemon."""

    folder: Path
    program: str = field(default_factory=lambda: need_program("buildah"))
    _images: dict[str, Image] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        (self.folder / "context").mkdir(parents=True)
        # Its own limits are higher than what a container may set.
        names = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        limits = [
            f"{name}={resource.getrlimit(limit_number)[1]}:{resource.getrlimit(limit_number)[1]}"
            for name, limit_number in names.items()
        ]
        self._config = self.folder / "containers.conf"
        self._config.write_text(f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n")
        self._pull_base()
        self.run("tag", _BASE, _VLLM_BASE)

    def run(self, *words: object, seconds: float = 600) -> str:
        """Run one of its commands, and return what it prints."""
        storage = ["--storage-driver=vfs", f"--root={self.folder / 'root'}", f"--runroot={self.folder / 'run'}"]
        environ = {**os.environ, "CONTAINERS_CONF": str(self._config), "HOME": str(self.folder)}
        result = subprocess.run(
            [self.program, *storage, *map(str, words)],
            check=False, capture_output=True, text=True, timeout=seconds, env=environ, cwd=ROOT,
        )  # fmt: skip
        assert result.returncode == 0, (result.stdout + result.stderr)[-2000:]
        return result.stdout.strip()

    def _pull_base(self) -> None:
        """Have the image that the Dockerfile begins with."""
        try:
            self.run("pull", "--quiet", _BASE, seconds=300)
        except (AssertionError, subprocess.TimeoutExpired):
            root = debian_python()
            container = self.run("from", "scratch")
            self.run("add", "--quiet", container, root, "/")
            # Where this machine reaches packages through a proxy, only its own list of authorities knows that.
            self.run("copy", "--quiet", container, f"/{_CERTIFICATES}", f"/{_CERTIFICATES}")
            self.run("config", "--env", f"PIP_CERT=/{_CERTIFICATES}", container)
            self.run("commit", "--quiet", container, _BASE)
            self.run("rm", container)

    def image(self, target: str) -> Image:
        """Return the image of a target of deploy/Dockerfile, built at the first call."""
        if target not in self._images:
            self._images[target] = self._build(target)
        return self._images[target]

    def _build(self, target: str) -> Image:
        words = ["--isolation=chroot", "--format=docker", "--pull=never", "--file=deploy/Dockerfile"]
        self.run("build", *words, f"--target={target}", f"--tag={target}", ".", seconds=1200)
        document = json.loads(self.run("inspect", "--type=image", target))
        root = Path(self.run("mount", self.run("from", "--pull=never", f"localhost/{target}")))
        for name in ("etc/hosts", "etc/resolv.conf"):
            (root / name).touch()
        for name in ("dev", "proc", "tmp"):
            (root / name).mkdir(exist_ok=True)
        return Image(root, document["Docker"]["config"], self.folder / f"volumes-{target}")

    def close(self) -> None:
        """Remove all images."""
        self.run("rm", "--all")
        self.run("rmi", "--all", "--force")
        shutil.rmtree(self.folder)


def check_namespaces() -> None:
    """Skip where this machine lets nobody mount."""
    result = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True, text=True)
    if result.returncode:
        missing("unshare --mount", result.stderr.strip(), required=False)
