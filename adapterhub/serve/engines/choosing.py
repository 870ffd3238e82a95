"""Which engine serves a base: the one that is named, or what is installed for the kind of its files."""

from __future__ import annotations

import importlib.util
import secrets
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import NotFoundError, UsageError

from . import Engine, command_lines

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

    from .over_http import Client, Process

AUTO, TORCH, LLAMA, VLLM, SGLANG, MLX = ENGINES = ("auto", "torch", "llama.cpp", "vllm", "sglang", "mlx")
_PROGRAMS = {LLAMA: "llama-server", VLLM: "vllm", SGLANG: "sglang", MLX: "mlx_lm.server"}
_MODULES = {VLLM: "vllm.entrypoints.openai.api_server", SGLANG: "sglang.launch_server", MLX: "mlx_lm.server"}


def _nothing(_note: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an engine is started for.

    Attributes:
        engine: One of ENGINES.
        base: The base, by its headers.
        name: The base's own name.
        weights: The base on this disk; None where somebody's own server has it.
        folder: For files of the engine, new and empty.
        url: Of somebody's own server; empty to start one.
        url_key: The key of that server; empty for none.
        program: The path of llama-server, or of a Python that has the engine; empty for what is installed.
        environ: The environment of the engine.
        most: Versions that it answers with at the same time.
        rank: The largest rank of them.
        one_process: One llama-server for all versions, not one for each.
        nf4: The reference host holds the base in NF4.
        cache: For quantized bases, and what somebody's own server goes on reading; None for none.
        resolves: Somebody's own vLLM has adapterhub's plugin.
        tell: Called with what the user should know of the choice.
        more: Further words of its command line.
    """

    engine: str
    base: BaseSpec
    name: str
    weights: Path | None
    folder: Path
    url: str = ""
    url_key: str = field(default="", repr=False)
    program: str = ""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    most: int = 8
    rank: int = 64
    one_process: bool = False
    nf4: bool = False
    cache: Path | None = None
    resolves: bool = False
    tell: Callable[[str], object] = field(default=_nothing, repr=False)
    more: tuple[str, ...] = ()


def pick(wanted: Wanted) -> str:
    """The name of the engine: for a GGUF file llama.cpp, for a folder vLLM, or else what is installed.

    Raises:
        UsageError: Somebody's own server has to be named.
        NotFoundError: None is installed.
    """
    if wanted.engine != AUTO:
        return wanted.engine
    if wanted.url:
        raise UsageError(wanted.url, "does not report which engine it is", "Name the engine", code="name-engine")
    apple = (MLX,) if sys.platform == "darwin" else ()
    order: tuple[str, ...] = (LLAMA, TORCH) if wanted.base.kind == "gguf" else (VLLM, SGLANG, *apple, TORCH)
    for name in order:
        if wanted.program or _installed(name, wanted.environ):
            return name
    what = f"none of {', '.join(order)} is installed"
    raise NotFoundError(wanted.name, what, "Install one of them, or name the program of one", code="no-engine")


def _installed(name: str, environ: Mapping[str, str]) -> bool:
    if name == TORCH:
        return all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
    if name in _MODULES and importlib.util.find_spec(_MODULES[name].partition(".")[0]):
        return True
    return _has_program(name, environ) or (name == LLAMA and _has_libllama())


def _has_program(name: str, environ: Mapping[str, str]) -> bool:
    return shutil.which(_PROGRAMS[name], path=environ.get("PATH")) is not None


def _has_libllama() -> bool:
    return importlib.util.find_spec("llama_cpp_py_sync") is not None


def opened(wanted: Wanted) -> Engine:
    """The engine, not started.

    Raises:
        NotFoundError: It is not installed.
        UsageError: It does not read the base, or the URL of somebody's own server is none.
    """
    if wanted.url and not wanted.url.startswith(("http://", "https://")):
        raise UsageError(wanted.url[:200], "is not the URL of a server", "Write it like http://127.0.0.1:8001")
    match pick(wanted):
        case "llama.cpp":
            return _llama_cpp(wanted)
        case "vllm":
            from . import vllm

            client, process = _server(wanted, VLLM, partial(command_lines.vllm, rank=wanted.rank, most=wanted.most))
            folder = (wanted.cache or wanted.folder) / "zeros"
            return vllm.Vllm(client, process, base=wanted.base, folder=folder, slots=wanted.most, resolves=wanted.resolves)
        case "sglang":
            from . import sglang

            client, process = _server(wanted, SGLANG, partial(command_lines.sglang, rank=wanted.rank, most=wanted.most))
            return sglang.Sglang(client, process, most=wanted.most)
        case "mlx":
            from . import mlx

            client, process = _server(wanted, MLX, command_lines.mlx)
            return mlx.Mlx(client, process, base=str(wanted.weights or wanted.name))
        case _:
            from . import in_process

            return in_process.torch_host(
                _on_disk(wanted), quantize=wanted.nf4, cache=wanted.cache, slots=wanted.most, rank=wanted.rank
            )


def _llama_cpp(wanted: Wanted) -> Engine:
    """llama-server, or llama.cpp's library where that program is not installed."""
    from . import llama_server

    if wanted.url:
        return llama_server.Attached(wanted.url, wanted.url_key)
    if wanted.base.kind != "gguf":
        raise UsageError(wanted.name, "is not a GGUF file, and llama.cpp reads no other", "Convert it", code="base-to-gguf")
    if not wanted.program and not _has_program(LLAMA, wanted.environ) and _has_libllama():
        if wanted.more:
            raise UsageError(wanted.more[0], "is for llama-server, which is not installed", "Install it, or name its program")
        from . import in_process

        wanted.tell(
            "llama-server is not installed: llama.cpp's library answers in this process, with a context for each request"
        )
        return in_process.libllama(_on_disk(wanted), most=wanted.most)
    [program] = _program(wanted, LLAMA)
    options = llama_server.Options(
        Path(program), _on_disk(wanted), wanted.folder, wanted.environ, most=wanted.most, more=wanted.more
    )
    return llama_server.OneProcess(options) if wanted.one_process else llama_server.Router(options)


def _server(wanted: Wanted, name: str, words: Callable[..., list[str]]) -> tuple[Client, Process | None]:
    """A client and the process that it asks; none for somebody's own."""
    from adapterhub.http_server.binding import free_port

    from .over_http import Client, Process

    if wanted.url:
        return Client(wanted.url, wanted.url_key), None
    port = free_port()
    named = () if name == MLX else (wanted.name,)
    command = words(_program(wanted, name), _on_disk(wanted), *named, port, more=wanted.more)
    environ, key = dict(wanted.environ), ""
    if name == VLLM:  # the others take a key only where everybody on the machine can read it
        key = secrets.token_urlsafe(24)
        environ |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": key}
    client = Client(f"http://127.0.0.1:{port}", key)
    ready: Callable[[], Awaitable[bool]] = partial(client.answers, "/health")
    return client, Process(command, environ, ready)


def _program(wanted: Wanted, name: str) -> list[str]:
    """The first words of the engine's command line."""
    module = _MODULES.get(name)
    if wanted.program:
        path = shutil.which(wanted.program, path=wanted.environ.get("PATH"))
        if path is None:
            raise NotFoundError(
                wanted.program, "no such program", "Name its path, or leave it out for the one that is installed"
            )
        return [path, "-m", module] if module else [path]
    if module and importlib.util.find_spec(module.partition(".")[0]):
        return [sys.executable, "-m", module]
    path = shutil.which(_PROGRAMS[name], path=wanted.environ.get("PATH"))
    if path is None:
        hint = f"Install it, or name its {'program' if module is None else 'Python'}"
        raise NotFoundError(_PROGRAMS[name], f"{name} is not installed", hint, code="no-engine")
    return [path] if module is None else [str(Path(path).resolve().with_name("python")), "-m", module]


def _on_disk(wanted: Wanted) -> Path:
    if wanted.weights is None:
        raise UsageError(wanted.name, "is not on this disk", "Name its folder or file")
    return wanted.weights
