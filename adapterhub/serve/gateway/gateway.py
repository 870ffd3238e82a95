"""Who asks for what, what they may ask for, and which version of an adapter answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter as Bag
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from adapterhub.digest import Digest
from adapterhub.http_server import binding
from adapterhub.ref import Ref
from adapterhub.serve import names, resolving
from adapterhub.serve.engines import Answer, Blend, Engine, EngineDownError
from adapterhub.serve.names import Allowed
from adapterhub.serve.served import Served
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError

from .answers import BUSY, DOWN, ProblemError, missing
from .lookup import Found, Lookup, RegistryLookup, RemoteLookup
from .metrics import Metrics, listed
from .reloading import Rules
from .rewriting import Usage
from .route_file import Key, Routes
from .settings import GatewaySettings
from .versions import Versions

log = logging.getLogger("adapterhub.serve")
_WATCHED = 64  # moving refs that are looked at, the last that were asked for
_RECENT = 600.0  # seconds that a ref is looked at after it was asked for

Parts = tuple[tuple[Found, float], ...]


@dataclass(slots=True)
class Asked:
    """What is known of a request.

    Attributes:
        path: Of the API.
        headers: By name in lower case.
        key: Who asks; None where nobody needs a key.
        model: What it names.
        version: What answers it: the base's name, `Served.model`, or a blend of those. Empty until it is known.
        label: The same in metrics: all blends are one.
    """

    path: str
    headers: Mapping[str, str]
    key: Key | None = None
    model: str = ""
    version: str = ""
    label: str = ""
    started: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class _Watched:
    ref: Ref
    digest: Digest | None = None
    asked: float = field(default_factory=time.monotonic)


class Gateway:
    """An engine with names in front of it."""

    def __init__(self, settings: GatewaySettings, engine: Engine) -> None:
        self.settings, self.engine = settings, engine
        self._rules = Rules(settings)
        self._workspace = replace(settings.workspace, policy=lambda: self._rules.policy)
        self._leases = ExitStack()
        self._lease = self._leases.enter_context(resolving.served_folder(settings.workspace).leased())
        remote = settings.remote
        self._lookup: Lookup = (
            RemoteLookup(self._workspace, remote, settings.poll) if remote else RegistryLookup(self._workspace)
        )
        self.metrics = Metrics(engine.slots, is_up=lambda: self._lookup.is_up)
        self.versions = Versions(engine, self._prepare, self._lease.drop, engine.most)

        self._watched: OrderedDict[str, _Watched] = OrderedDict()
        self._watching: asyncio.Task[None] | None = None
        self._running: Bag[str] = Bag()  # requests by the name of their key, empty without one
        self.ready = False

    async def start(self) -> None:
        """Start the engine, and look at tags from then on; LocalIOError or RefusedError if the engine cannot be started."""
        began = time.monotonic()
        try:
            await self._lookup.check()
            await self._check_base_name()
        except RefusedError:
            raise
        except AdapterhubError as error:
            log.warning("%s; until it is there, the base alone is served", error)
        await self.engine.start()
        self.ready = True
        self._watching = asyncio.create_task(self._watch())
        took = round(time.monotonic() - began, 1)
        log.info("%s is ready after %.1f s", self.engine.name, took, extra={"fields": {"engine": self.engine.name, "s": took}})

    async def _check_base_name(self) -> None:
        """RefusedError for a base with the name of an adapter, for which it would answer."""
        with suppress(UsageError, NotFoundError):  # no name of an adapter
            for part in self._parsed(self.settings.base_name):
                await self._lookup.find(part.ref)
                if part.ref.name in self.settings.allowed:
                    where, what = self.settings.base_name, "is the name of the base and of an adapter"
                    raise RefusedError(where, what, "Give the base another one", code="name-of-base-and-adapter")

    async def close(self) -> None:
        """End the engine."""
        self.ready = False
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self.versions.close()
        await self.engine.close()
        self._lookup.close()
        self._leases.close()

    async def healthy(self) -> bool:
        """Whether requests are answered."""
        return self.ready and await self.engine.healthy()

    @property
    def routes(self) -> Routes:
        """The routes and the keys."""
        return self._rules.routes

    def reload(self) -> None:
        """Read the routes and the policy again, and check all versions by them; a malformed file changes nothing."""
        self._rules.read()
        self.versions.check_again()  # without a change too: keys of signers, or the policy of the registry, may be others

    # ---- who may ask

    def key_of(self, headers: Mapping[str, str]) -> Key | None:
        """Who asks; ProblemError where a key is needed and there is none, or an unknown one, and for pages of other sites."""
        if not self.routes.keys:
            if not self.settings.behind_proxy:
                _check_site(headers)
            return None
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if not secret or kind.lower() != "bearer":
            raise ProblemError(401, "Send an API key as Authorization: Bearer KEY", code="invalid_api_key")
        found = self.routes.key_of(secret.strip())
        if found is None:
            raise ProblemError(401, "Incorrect API key", code="invalid_api_key")
        return found

    @contextmanager
    def admitted(self, key: Key | None) -> Iterator[None]:
        """Count a request until it ends; ProblemError for one too many."""
        if not self.ready:
            raise ProblemError(503, "The engine is starting", code=DOWN, seconds=2)
        if key is not None and key.windows is not None and (window := key.windows.count(key.name)).over:
            raise ProblemError(
                429,
                f"More than {key.windows.most} requests in {key.windows.seconds:,} seconds",
                code=BUSY,
                seconds=window.seconds,
            )
        if key is not None and key.tokens is not None and (window := key.tokens.count(key.name, 0)).over:
            raise ProblemError(
                429, f"More than {key.tokens.most} tokens in {key.tokens.seconds:,} seconds", code=BUSY, seconds=window.seconds
            )
        name = key.name if key is not None else ""
        if key is not None and key.most and self._running[name] >= key.most:
            raise ProblemError(
                429, f"As many requests of this key are running as may at once: {key.most}", code=BUSY, seconds=1
            )
        if self._running.total() >= self.settings.requests:
            what = f"As many requests are running as may at once: {self.settings.requests}"
            raise ProblemError(429, what, code=BUSY, seconds=1)
        self._running[name] += 1
        try:
            with self.metrics.now.track_inprogress():
                yield
        finally:
            self._running[name] -= 1

    @contextmanager
    def metered(self, key: Key | None, body: Mapping[str, Any]) -> Iterator[Usage]:
        """Count the tokens of a request against the budget of its key, also of one that its client ends."""
        budget = key.tokens if key is not None else None
        usage = Usage(body, counts=budget is not None)
        try:
            yield usage
        except asyncio.CancelledError:  # codespell:ignore
            usage.begun = True  # the engine may have read the prompt
            raise
        finally:
            if key is not None and budget is not None:
                budget.count(key.name, usage.total)

    # ---- what answers

    @asynccontextmanager
    async def answered(self, asked: Asked, body: Mapping[str, Any]) -> AsyncIterator[Answer]:
        """Ask the engine with the version that a request names; the answer ends with the context.

        Raises:
            ProblemError: The request cannot be answered like this.
            AdapterhubError: There is no such version, or the engine would not apply it as it was trained.
            EngineDownError: The engine does not answer for now.
        """
        self._check(asked, body)
        parts = await self._parts(asked, str(body.get("user") or ""))
        is_blend = len(parts) > 1 or any(weight != 1 for _, weight in parts)
        asked.version = self.version_of(parts)
        asked.label = "blend" if is_blend else asked.version
        if is_blend and not self.engine.blends:
            raise ProblemError(400, f"{self.engine.name} answers with one version, not with a blend", param="model")
        async with self._counted(asked.model if parts else "", parts) as blend:
            answer = await self.engine.ask(asked.path, body, blend)
            try:
                yield answer
            finally:
                await answer.close()

    @asynccontextmanager
    async def _counted(self, model: str, parts: Parts) -> AsyncIterator[Blend]:
        """The blend, with its name in the gauge of adapters that are waited for, then in that of those which run."""
        with ExitStack() as waiting:
            waiting.enter_context(listed(self.metrics.waiting, model))
            async with self.versions.used(parts) as blend:
                waiting.close()
                with listed(self.metrics.running, model):
                    yield blend

    def _check(self, asked: Asked, body: Mapping[str, Any]) -> None:
        if asked.path not in self.engine.paths:
            what = f"{self.engine.name}, as it was started, answers {' and '.join(sorted(self.engine.paths))}, not {asked.path}"
            raise ProblemError(404, what, code="unsupported")
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise ProblemError(400, "`model` is missing, or not a text", param="model")
        asked.model = model
        for name in self.engine.own:
            if name in body:
                what = f"`{name}` would choose an adapter, or a cache, past `model`; leave it out"
                raise ProblemError(400, what, code="unsupported", param=name)

    async def _parts(self, asked: Asked, user: str) -> Parts:
        """The versions that a request means at this moment, each once."""
        model, key = asked.model, asked.key
        route = self.routes.routes.get(model)
        if route is None and model == self.settings.base_name:
            self._check_allowed(key, model, model)
            return ()
        if route is not None:
            self._check_allowed(key, model, model)
            parsed = names.parse(route.chosen(asked.headers, user, key.name if key else ""))
        else:
            parsed = self._parsed(model)
            for part in parsed:
                self._check_allowed(key, part.ref.name, model)
                self.settings.allowed.check(part.ref)
        weights: dict[Found, float] = {}
        for part in parsed:
            found = await self._find(part.ref)
            weights[found] = weights.get(found, 0.0) + part.weight
        return tuple(weights.items())

    def _check_allowed(self, key: Key | None, name: str, model: str) -> None:
        if key is not None and name not in key.allowed:
            # What is not a ref gets the same error as where no adapter has the name.
            self._parsed(model)
            raise missing(model)

    def _parsed(self, model: str) -> tuple[names.Part, ...]:
        return names.parse(model, namespace=self.settings.allowed.namespace, remote=self.settings.remote_name)

    async def _find(self, ref: Ref) -> Found:
        found = await self._lookup.find(ref)
        if names.is_moving(ref):
            watched = self._watched.setdefault(str(ref), _Watched(ref))
            watched.asked, watched.digest = time.monotonic(), found.digest
            self._watched.move_to_end(str(ref))
            if len(self._watched) > _WATCHED:
                self._watched.popitem(last=False)
        return found

    def version_of(self, parts: Parts) -> str:
        """What an answer says it comes from."""
        if not parts:
            return self.settings.base_name
        return "+".join(found.model if weight == 1 else f"{found.model}*{weight:.15g}" for found, weight in parts)

    def _prepare(self, found: Found) -> Served:
        base, address = self.settings.base, self._lookup.address(found)
        served = resolving.resolve(address, runtime=self.engine.runtime, base=base, workspace=self._workspace)
        served = replace(served, name=found.name)  # without what the URL of a remote has before it
        self._lease.add(served)
        return served

    # ---- what is there

    async def listed(self, key: Key | None) -> list[tuple[str, Found | None]]:
        """What somebody may ask for, with the version that it means now; None for the base, and for routes."""
        mine = key.allowed if key else Allowed()
        own = [name for name in (self.settings.base_name, *self.routes.routes) if name in mine]
        found = await self._lookup.listed(self.settings.allowed)
        return [*((name, None) for name in own), *((ref, version) for ref, version in found if version.name in mine)]

    async def meant(self, asked: Asked) -> Parts:
        """The versions that a name means to somebody."""
        return await self._parts(asked, "")

    # ---- tags that move

    async def _watch(self) -> None:
        """Look at files of rules, at the tags that are in use, and at those of routes; make ready what they have moved to."""
        while True:
            if self._rules.have_changed():
                self.reload()
            for watched in self._to_watch():
                try:
                    await self._look(watched)
                except (AdapterhubError, EngineDownError):
                    pass  # who asks is told
                except Exception:
                    log.exception("%s cannot be looked at; it will be again", watched.ref)
            await self.versions.forget_idle()
            await asyncio.sleep(self.settings.poll)

    def _to_watch(self) -> list[_Watched]:
        for route in list(self.routes.routes.values())[:_WATCHED]:
            for target in (route.to, *(rule.to for rule in route.rules)):
                for text, _ in target.shares:
                    for part in names.parse(text):
                        self._watched.setdefault(str(part.ref), _Watched(part.ref)).asked = time.monotonic()
        since = time.monotonic() - _RECENT
        for name in [name for name, watched in self._watched.items() if watched.asked < since]:
            del self._watched[name]
        return [*self._watched.values()]

    async def _look(self, watched: _Watched) -> None:
        found = await self._lookup.find(watched.ref)
        if found.digest == watched.digest:
            return
        if watched.digest is not None:
            self.metrics.moves.inc()
            fields = {"ref": str(watched.ref), "version": found.model}
            log.info("%s is %s now", watched.ref, found.digest, extra={"fields": fields})
        watched.digest = found.digest
        await self.versions.prefetch(found)


def _check_site(headers: Mapping[str, str]) -> None:
    """Refuse requests that a browser sends for a page of somebody else's, where no key tells them from the user's own.

    A site whose name leads to this machine has its own name as the host (DNS rebinding); any other has it as the origin.
    """
    host = headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not binding.is_loopback(name.lower()):
        what = f"Without keys, only this machine is answered, and not as {printable(host[:80])!r}; ask for localhost"
        raise ProblemError(403, what, code="foreign_site")
    origin = headers.get("origin", "")
    if origin and origin.partition("://")[2] != host:
        raise ProblemError(403, f"Without keys, no page of {printable(origin[:80])} is answered", code="foreign_site")
