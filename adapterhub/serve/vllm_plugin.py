"""A resolver for vLLM: the name that a request gives as its `model` may be a version in a registry.

vLLM 0.32 and 0.33 ask resolvers for names that they do not know (`vllm/lora/resolver.py`), and

- never ask for a name again, whatever its tag means later: a name that may move is refused, or pinned to what it meant first;
- read the folder again inside the engine after evicting the adapter, and shut down the server if it is gone: folders are held
  until this process ends;
- serve the base, with the adapter's name and status 200, if the adapter fits no module: `resolving` refuses whatever would not
  be applied as it was trained;
- ask all adapters by the chat template of the base: versions that were trained with one of their own are refused, unless
  clients send it;
- pass on the text of errors, but not why an adapter could not be loaded: a rank above its maximum is refused here.

`cli/vllm_settings.py` has the entry point, which reads the environment. Nothing of vLLM is imported before `register`, which
neither reads nor writes a file: vLLM calls it in each of its processes, and resolves names in only one of them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import field, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from adapterhub.operations import base_sources, source_names
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref, RefError
from adapterhub.remotes import remote_address
from adapterhub_converters.errors import AdapterhubError, LocalIOError, NotFoundError, RefusedError, RemoteError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import model_names, resolving, vllm_rank
from .model_names import NOT_SERVED, AllowedNames
from .prepared_versions import OWN_TEMPLATE, PreparedVersion, ServedLease

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

RESOLVER = "adapterhub"
"""The name of the resolver in vLLM."""
MOVING, BLEND, TOO_MANY = "moving-tag", "blend", "too-many-names"
"""The codes of errors for requests that vLLM cannot serve under one name."""
_OTHER_PROMPT = "was trained with a chat template, options or a date of its own, and vLLM asks all adapters as it asks the base"
_WORKERS = 4
_RETRY_SECONDS = 10.0  # seconds after which a refused name is looked up again
_MAX_REFUSALS = 1024  # refused names that are remembered
_MAX_NAMES = 10_000  # names that are served; a version may have several


def _same_ref(ref: str) -> str:
    return ref


@dataclass(frozen=True, slots=True)
class Settings:
    """What is served, and where it is looked up.

    Attributes:
        allowed: The names that may be asked for.
        workspace: Returns the workspace; called in a thread when the first name is asked for.
        address: Returns the address of a ref, if versions are pulled from a remote; by default the ref itself, in the registry.
        remote: The name of that remote, which names may begin with; empty if it has none.
        base: The base model, if vLLM's name for it does not lead to its config; empty for vLLM's name.
        pin: Serve names that may move, as the version they meant first, until the process ends.
        clients_render: Serve versions with a chat template of their own, which clients send with each conversation.
        patience: Seconds that a request waits for its adapter; the work continues for later requests.
    """

    allowed: AllowedNames
    workspace: Callable[[], Workspace] = Workspace
    address: Callable[[str], str] = _same_ref
    remote: str = ""
    base: str = ""
    pin: bool = False
    clients_render: bool = False
    patience: float = 60.0


def register(settings: Settings) -> None:
    """Register the resolver with vLLM; a second call does nothing.

    Raises:
        RuntimeError: vLLM is set to serve the base under every name that it does not know, without asking resolvers.
    """
    from vllm import envs
    from vllm.logger import init_logger
    from vllm.lora.resolver import LoRAResolverRegistry

    if RESOLVER in LoRAResolverRegistry.get_supported_resolvers():
        return
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
        raise RuntimeError(
            "VLLM_SKIP_MODEL_NAME_VALIDATION is set: vLLM would answer for every adapter with the base. Unset it"
        )
    logger = init_logger("vllm.adapterhub")
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        logger.warning("vLLM asks for no adapter unless VLLM_ALLOW_RUNTIME_LORA_UPDATING is True")
    LoRAResolverRegistry.register_resolver(RESOLVER, _resolver(ServedVersions(settings, logger.warning)))


def _resolver(versions: ServedVersions) -> Any:
    """Return the `LoRAResolver` that vLLM calls."""
    from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class Resolver(LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            versions.max_rank = versions.max_rank or vllm_rank.maximum_of_caller()
            try:
                served = await versions.find(lora_name, base_model_name)
            except (UsageError, RefusedError) as error:
                message = f"{error.code}: {error}" if error.own_code else str(error)
                raise (VLLMNotFoundError(message) if error.code == NOT_SERVED else ValueError(message)) from None
            except NotFoundError as error:  # without its hint, which may name adapters that the client must not see
                raise VLLMNotFoundError(f"{lora_name}: {error.what}") from None
            except AdapterhubError:  # a disk or a remote; only the log has details, which may not concern the client
                message = f"{lora_name[: model_names.MAX_LENGTH]}: cannot be prepared now. Ask again later"
                raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE) from None
            # vLLM replaces the id, and caches what it computed under the name and the path.
            return served and LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(served.path))

    return Resolver()


@dataclass
class ServedVersions:
    """The versions that a running vLLM serves, by the names in requests; each is held until the process ends.

    Attributes:
        settings: What is served.
        tell: Callback for the operator, which takes a format and its values.
        max_rank: The largest rank that vLLM was started for; 0 if that is not known.
    """

    settings: Settings
    tell: Callable[..., object]
    max_rank: int = 0
    _served: dict[str, PreparedVersion] = field(default_factory=dict)
    _refusals: OrderedDict[str, tuple[float, AdapterhubError]] = field(default_factory=OrderedDict)
    _work: dict[str, Future[PreparedVersion]] = field(default_factory=dict)
    _lock: threading.Lock = field(
        default_factory=threading.Lock
    )  # never held during disk access, because the event loop waits for it

    def __post_init__(self) -> None:
        self._environment = _Environment(self.settings, self.tell)
        # Pulling and converting block, and vLLM resolves names in its event loop.
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix=RESOLVER)

    async def find(self, model: str, base: str) -> PreparedVersion | None:
        """Return the prepared version that a name means; None for a text that cannot be the name of a version.

        Args:
            model: The name in the request.
            base: vLLM's name of the base model.

        Raises:
            NotFoundError: There is no such version.
            RefusedError: It may not be served, or vLLM would not apply it as it was trained.
            RemoteError: It is not ready in time.
        """
        if served := self._served.get(model):  # known from before; vLLM has unloaded it since
            return served
        try:
            parts = model_names.parse(model, namespace=self.settings.allowed.namespace, remote=self.settings.remote)
        except RefError:
            return None
        # A weight is a blend as well: vLLM has no way to scale an adapter per request.
        if len(parts) > 1 or parts[0].weight != 1:
            raise RefusedError(model, "a blend, and vLLM applies one adapter to a request", code=BLEND)
        self._check(model, parts[0].ref)
        with self._lock:
            work = self._work.get(model)
            if work is None:
                work = self._work[model] = self._pool.submit(self._prepare, model, parts[0].ref, base)
        try:
            # Shielded, so that the work goes on when this request gives up.
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(work)), self.settings.patience)
        except TimeoutError:
            raise RemoteError(model, f"not ready after {self.settings.patience:.0f} s", "Ask again") from None

    def _check(self, model: str, ref: Ref) -> None:
        """Raise RefusedError for a name that is not served; a recent error for the same name is raised again."""
        self.settings.allowed.check(ref)
        if model_names.is_moving(ref) and not self.settings.pin:
            problem = "may mean another version later, which vLLM would not notice"
            raise RefusedError(str(ref), problem, f"Name a version, like {ref.name}:v3, or a digest", code=MOVING)
        with self._lock:
            refused_at, error = self._refusals.get(model, (0.0, None))
        if error is not None and time.monotonic() < refused_at + _RETRY_SECONDS:
            raise error.with_traceback(None)  # whose traceback would grow each time
        if len(self._served) >= _MAX_NAMES:
            raise RefusedError(model, f"{_MAX_NAMES:,} other names were asked for", "Restart vLLM", code=TOO_MANY)

    def _prepare(self, model: str, ref: Ref, base: str) -> PreparedVersion:
        """Resolve and hold a version; runs in a thread."""
        try:
            served = self._environment.resolve(ref, base, self.max_rank)
        except AdapterhubError as error:
            self.tell("%a is not served: %a", model, str(error))
            with self._lock:
                self._refusals[model] = (time.monotonic(), error)
                self._refusals.move_to_end(model)
                while len(self._refusals) > _MAX_REFUSALS:
                    self._refusals.popitem(last=False)
            raise
        else:
            self._served[model] = served
            return served
        finally:
            with self._lock:
                del self._work[model]


class _Environment:
    """A workspace, the base model, and the lease on everything resolved; opened by the first thread that uses it."""

    def __init__(self, settings: Settings, tell: Callable[..., object]) -> None:
        self._settings = settings
        self._tell = tell
        self._lock = threading.Lock()
        self._stack = ExitStack()  # never closed: the lease ends with the process
        self._opened: tuple[Workspace, ServedLease] | None = None
        self._specs: dict[str, BaseSpec] = {}

    def resolve(self, ref: Ref, base: str, max_rank: int) -> PreparedVersion:
        """Prepare a version, and hold it unless its rank is too large."""
        address = self._settings.address(str(ref))
        with self._lock:
            workspace, lease = self._opened = self._opened or self._open()
            spec = self._base(self._settings.base or base, workspace)
        try:
            if source_names.is_address(address):
                resolving.check_name(ref, remote_address.parse(address), workspace)
            served = resolving.resolve(address, runtime="vllm", base=spec, workspace=workspace)
        except NotFoundError as error:
            if error.code == "no-registry":  # its disk may come back
                raise LocalIOError(error.where, error.what) from error
            raise
        vllm_rank.check(served.ref, served.rank, max_rank)
        if served.prompt and not self._settings.clients_render:
            raise RefusedError(served.ref, _OTHER_PROMPT, "Serve it through a gateway", code=OWN_TEMPLATE)
        lease.add(served)
        return served

    def _open(self) -> tuple[Workspace, ServedLease]:
        """Open the workspace, and a lease on its folder of prepared versions."""
        workspace = replace(self._settings.workspace(), tell=lambda note: self._tell("%a", note))
        return workspace, self._stack.enter_context(resolving.served_folder(workspace).open_lease())

    def _base(self, name: str, workspace: Workspace) -> BaseSpec:
        """Return the specification of the base model, read once per name."""
        if name not in self._specs:
            try:
                self._specs[name] = base_sources.read_base(name, workspace)
            except AdapterhubError as error:
                raise LocalIOError(name, f"the base model cannot be read, so no adapter fits it: {error}") from error
        return self._specs[name]
