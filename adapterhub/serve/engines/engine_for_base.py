"""The choice of the engine for a base: the one that is named, or an installed one that reads this kind of file."""

from __future__ import annotations

import importlib.util
import math
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import NotFoundError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import Engine, command_lines

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

    from .engine_client import Client
    from .engine_pool import EnginePool
    from .pooled_engine import EngineAddress
    from .server_process import Process

AUTO, TORCH, LLAMA, VLLM, SGLANG, MLX = ENGINES = ("auto", "torch", "llama.cpp", "vllm", "sglang", "mlx")
_LLAMA_CONTEXT = 4096  # tokens; llama.cpp allocates the keys and values of all of them at its start
_PROGRAMS = {LLAMA: "llama-server", VLLM: "vllm", SGLANG: "sglang", MLX: "mlx_lm.server"}
_MODULES = {VLLM: "vllm.entrypoints.openai.api_server", SGLANG: "sglang.launch_server", MLX: "mlx_lm.server"}


def _do_nothing(_note: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options that an engine is started with.

    Attributes:
        engine: One of ENGINES.
        base: The base, as its headers describe it.
        name: The base's own name.
        weights: The base on this disk; None if the user's own server has it.
        folder: A new and empty folder for files of the engine.
        url: The URL of the user's own server; empty to start one.
        url_key: The key of that server; empty for none.
        program: The path of llama-server, or of a Python that has the engine; empty for what is installed.
        environ: The environment of the engine.
        max_adapters: The number of versions with which it answers at the same time.
        max_rank: The largest rank of these versions.
        one_process: Whether one llama-server serves all versions, instead of one each.
        nf4: Whether the reference host holds the base in NF4.
        cache: A folder for quantized bases, and for files that the user's own server keeps reading; None for none.
        has_plugin: Whether the user's own vLLM has adapterhub's plugin.
        context: The tokens of a conversation; 0 for the engine's choice, which for llama-server is 4,096.
        dtype: The type that torch, vLLM and SGLang compute in; empty for the base's own.
        parallel: The requests that one process of llama-server answers at once.
        timeout: The seconds until an answer must begin, and between two pieces of it; None for no limit.
        tell: Callback for notes about the choice.
        extra_words: More words of its command line.
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
    max_adapters: int = 8
    max_rank: int = 64
    one_process: bool = False
    nf4: bool = False
    cache: Path | None = None
    has_plugin: bool = False
    context: int = 0
    dtype: str = ""
    parallel: int = 4
    timeout: float | None = None
    tell: Callable[[str], object] = field(default=_do_nothing, repr=False)
    extra_words: tuple[str, ...] = ()


def pick(options: EngineOptions) -> str:
    """Return the name of the engine: llama.cpp for a GGUF file, vLLM for a folder, or else an installed one.

    Raises:
        UsageError: The engine of the user's own server must be named.
        NotFoundError: No engine is installed.
    """
    if options.engine != AUTO:
        return options.engine
    if options.url:
        raise UsageError(options.url, "does not report which engine it is", "Name the engine", code="name-engine")
    # mlx runs on Apple's processors only.
    apple = (MLX,) if sys.platform == "darwin" else ()
    order: tuple[str, ...] = (LLAMA, TORCH) if options.base.kind == "gguf" else (VLLM, SGLANG, *apple, TORCH)
    for name in order:
        if options.program or _is_installed(name, options.environ):
            return name
    problem = f"none of {', '.join(order)} is installed"
    raise NotFoundError(options.name, problem, "Install one of them, or name the program of one", code="no-engine")


def _is_installed(name: str, environ: Mapping[str, str]) -> bool:
    """Return whether an engine is installed, as a module or as a program."""
    if name == TORCH:
        return all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
    if name in _MODULES and importlib.util.find_spec(_MODULES[name].partition(".")[0]):
        return True
    return _has_program(name, environ) or (name == LLAMA and _has_libllama())


def _has_program(name: str, environ: Mapping[str, str]) -> bool:
    return shutil.which(_PROGRAMS[name], path=environ.get("PATH")) is not None


def _has_libllama() -> bool:
    return importlib.util.find_spec("llama_cpp_py_sync") is not None


def open_engine(options: EngineOptions) -> Engine:
    """Return the engine, not yet started.

    Raises:
        NotFoundError: It is not installed.
        UsageError: It does not read the base, or the URL of the user's own server is malformed.
    """
    if options.url and not options.url.startswith(("http://", "https://")):
        raise UsageError(options.url[:200], "is not the URL of a server", "Write it like http://127.0.0.1:8001")
    name = pick(options)
    _check_startable(options, name)
    match name:
        case "llama.cpp":
            return _open_llama_cpp(options)
        case "vllm":
            from . import vllm

            client, process = _server(options, VLLM, partial(command_lines.vllm, **_sizes(options)))
            folder = (options.cache or options.folder) / "zeros"
            max_rank = 0 if options.url else command_lines.vllm_max_rank(options.max_rank, options.extra_words)
            priorities = bool(options.url) or command_lines.vllm_has_priorities(options.extra_words)
            fields: dict[str, Any] = {"slots": options.max_adapters, "max_rank": max_rank, "has_plugin": options.has_plugin}
            # One that is started here takes templates from the gateway alone, unless its user's words say so.
            fields["takes_templates"] = bool(options.url) or command_lines.VLLM_TEMPLATES in options.extra_words
            return vllm.Vllm(client, process, base=options.base, folder=folder, priorities=priorities, **fields)
        case "sglang":
            from . import sglang

            client, process = _server(options, SGLANG, partial(command_lines.sglang, **_sizes(options)))
            return sglang.Sglang(client, process, base=options.base, max_adapters=options.max_adapters)
        case "mlx":
            from . import mlx

            client, process = _server(options, MLX, command_lines.mlx)
            return mlx.Mlx(client, process, base=str(options.weights or options.name))
        case _:
            from . import in_process

            context = {"tokens": options.context} if options.context else {}
            limits = {"slots": options.max_adapters, "rank": options.max_rank, **context}
            dtype, quantize = options.dtype or None, options.nf4
            return in_process.torch_host(
                _weights_on_disk(options), dtype=dtype, quantize=quantize, cache=options.cache, **limits
            )


def open_pool(options: EngineOptions, fixed: Sequence[EngineAddress], listed: Sequence[EngineAddress]) -> EnginePool:
    """Return the user's own servers as one engine, not yet started: those of the command line, and those of the route file."""
    from .engine_pool import EnginePool

    def open_at(address: EngineAddress) -> Engine:
        variable = address.key_variable
        if variable and not options.environ.get(variable):
            raise UsageError(address.name, f"its key should be in ${variable}, which is not set", "Set it, and start again")
        key = options.environ[variable] if variable else options.url_key
        return open_engine(replace(options, url=address.url, url_key=key))

    return EnginePool(open_at, fixed, listed)


def _check_startable(options: EngineOptions, name: str) -> None:
    """Raise UsageError for an option that the engine cannot be started with, and would ignore."""
    programs = (LLAMA, VLLM, SGLANG, MLX)
    choices: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
        (f"context {options.context}", bool(options.context), (TORCH, LLAMA, VLLM, SGLANG)),
        (f"dtype {options.dtype}", bool(options.dtype), (TORCH, VLLM, SGLANG)),
        (f"program {options.program}", bool(options.program), programs),
        ("one process", options.one_process, (LLAMA,)),
        ("NF4", options.nf4, (TORCH,)),
        (" ".join(options.extra_words)[:80], bool(options.extra_words), programs),
    )
    for text, is_chosen, engines in choices:
        if is_chosen and options.url:
            raise UsageError(text, f"the engine at {options.url} is already running", "Set it where that engine is started")
        if is_chosen and name not in engines:
            raise UsageError(text, f"is not for {name}", f"It is for {', '.join(engines)}")


def _sizes(options: EngineOptions) -> dict[str, Any]:
    """Return the options that the command lines of vLLM and SGLang have in common."""
    return {name: getattr(options, name) for name in ("max_rank", "max_adapters", "context", "dtype")}


def _weight_type(base: BaseSpec) -> str:
    """Return the type of most weights of a file, such as `Q8_0`."""
    sizes: Counter[str] = Counter()
    for tensor in (base.stored or base.tensors).values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else ""


def _open_llama_cpp(options: EngineOptions) -> Engine:
    """Return llama-server, or llama.cpp's library if that program is not installed."""
    from . import llama_attached, llama_one_process, llama_router, llama_server

    if options.url:
        return llama_attached.AttachedServer(options.url, options.url_key, base=options.base, patience=options.timeout)
    if options.base.kind != "gguf":
        raise UsageError(options.name, "is not a GGUF file, and llama.cpp reads no other", "Convert it", code="base-to-gguf")
    if not options.program and not _has_program(LLAMA, options.environ) and _has_libllama():
        if options.extra_words:
            raise UsageError(
                options.extra_words[0], "is for llama-server, which is not installed", "Install it, or name its program"
            )
        from . import in_process

        options.tell(
            "llama-server is not installed: llama.cpp's library answers in this process, with a context for each request"
        )
        weights, precision = _weights_on_disk(options), _weight_type(options.base)
        return in_process.libllama(weights, max_adapters=options.max_adapters, context=options.context, precision=precision)
    [program] = _program(options, LLAMA)
    server_options = llama_server.LlamaServerOptions(
        Path(program),
        _weights_on_disk(options),
        options.folder,
        options.environ,
        context=_llama_context(options),
        parallel=options.parallel,
        max_adapters=options.max_adapters,
        extra_words=options.extra_words,
        precision=_weight_type(options.base),
        timeout=options.timeout,
    )
    return llama_one_process.OneProcess(server_options) if options.one_process else llama_router.Router(server_options)


def _llama_context(options: EngineOptions) -> int:
    """Return the tokens of a conversation; by default no more than the base was trained with."""
    trained = options.base.config.get("max_position_embeddings")
    return options.context or min(_LLAMA_CONTEXT, trained if isinstance(trained, int) and trained > 0 else _LLAMA_CONTEXT)


def _server(options: EngineOptions, name: str, words: Callable[..., list[str]]) -> tuple[Client, Process | None]:
    """Return a client and the process that it talks to; None for the user's own server."""
    from adapterhub.http_server.binding import free_port

    from .engine_client import Client
    from .server_process import Process

    if options.url:
        return Client(options.url, options.url_key, patience=options.timeout), None
    # Chosen here rather than by the engine, because the client must know it before the engine starts.
    port = free_port()
    base_names = () if name == MLX else (options.name,)
    command = words(_program(options, name), _weights_on_disk(options), *base_names, port, extra_words=options.extra_words)
    environ, key = dict(options.environ), ""
    if name == VLLM:  # the others take a key only on the command line, which everyone on the machine can read
        key = secrets.token_urlsafe(24)
        environ |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_API_KEY": key}
    client = Client(f"http://127.0.0.1:{port}", key, patience=options.timeout)
    ready: Callable[[], Awaitable[bool]] = partial(client.answers, "/health")
    return client, Process(command, environ, ready)


def _program(options: EngineOptions, name: str) -> list[str]:
    """Return the first words of the engine's command line."""
    module = _MODULES.get(name)
    if options.program:
        path = shutil.which(options.program, path=options.environ.get("PATH"))
        if path is None:
            raise NotFoundError(
                options.program, "no such program", "Name its path, or leave it out for the one that is installed"
            )
        return [path, "-m", module] if module else [path]
    if module and importlib.util.find_spec(module.partition(".")[0]):
        return [sys.executable, "-m", module]
    path = shutil.which(_PROGRAMS[name], path=options.environ.get("PATH"))
    if path is None:
        hint = f"Install it, or name its {'program' if module is None else 'Python'}"
        raise NotFoundError(_PROGRAMS[name], f"{name} is not installed", hint, code="no-engine")
    return [path] if module is None else [str(Path(path).resolve().with_name("python")), "-m", module]


def _weights_on_disk(options: EngineOptions) -> Path:
    """Return the base's files; UsageError if they are not on this disk."""
    if options.weights is None:
        raise UsageError(options.name, "is not on this disk", "Name its folder or file")
    return options.weights
