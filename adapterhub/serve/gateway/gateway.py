"""The gateway: which version of an adapter answers a request, and what is recorded of the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

from adapterhub.ref import Ref, is_pattern
from adapterhub.registry import withdrawals
from adapterhub.serve import model_names, resolving
from adapterhub.serve.engines import Blend, Engine
from adapterhub.serve.engines.engine_pool import EnginePool
from adapterhub.serve.model_names import AllowedNames
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub.serve.usage.answer_log import AnswerRecord, Feedback
from adapterhub.serve.usage.token_counts import TokenCounts
from adapterhub.serve.usage.usage_recorder import UsageRecorder
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.runtime_rules import RuntimeName

from . import deprecations, priorities, spans
from .access import Access, ReservedTokens
from .engine_metrics import EngineMetrics
from .engine_versions import EngineVersions
from .front import GatewayFront, GatewayRequest
from .gateway_settings import GatewaySettings
from .lookup import Lookup, RegistryLookup, RemoteLookup, ResolvedVersion
from .metrics import AdapterRequest, Metrics
from .moving_refs import MovingRefs
from .openai_errors import DOWN, ProblemError, not_served
from .reloading import Rules
from .rollout_evidence import AnswerOutcome
from .rollouts import Rollouts
from .route_file import Key, Route, Routes
from .shadows import RequestCopy, Shadows
from .warm_routes import WarmRoutes

log = logging.getLogger("adapterhub.serve")
_LOOKUP_SECONDS = 2.0  # seconds in which a place of names must answer to count as ready
# Seconds between looks for an answer by its id: a worker records it after its client has it, another gateway in half a second.
_WAITS_FOR_ANSWER = (0.01, 0.04, 0.15, 0.5)
_MAX_VERSION = 1000  # characters of a version in the log of answers; a blend may have any number

VersionParts = tuple[tuple[ResolvedVersion, float], ...]


class Gateway(GatewayFront):
    """An engine with names in front of it."""

    def __init__(self, settings: GatewaySettings, engine: Engine) -> None:
        super().__init__(settings, engine)
        self._rules = Rules(settings)
        self._workspace = replace(settings.workspace, policy=lambda: self._rules.policy)
        self._leases = ExitStack()
        # One lease for all versions, held until the gateway ends.
        self._lease = self._leases.enter_context(resolving.served_folder(settings.workspace).open_lease())
        remote = settings.remote
        self._lookup: Lookup = (
            RemoteLookup(self._workspace, remote, settings.poll) if remote else RegistryLookup(self._workspace)
        )
        self.metrics = Metrics(engine.slots, is_up=lambda: self._lookup.is_up)
        if isinstance(engine, EnginePool):
            self.metrics.registry.register(EngineMetrics(engine))
        self.versions = EngineVersions(engine, self._prepare, self._lease.drop, engine.max_adapters)
        self._warm_routes = WarmRoutes(self._lookup, self.versions)
        # A connection of its own, so that a write that waits for the registry's lock holds up no lookup.
        self.rollouts = Rollouts(RegistryLookup(self._workspace), self._lookup.find, settings.usage)

        self._recorder = UsageRecorder(settings.usage, has_budgets=lambda: self.routes.has_calendar_budgets)
        self._adding_feedback = asyncio.Lock()
        self._lookups = 0  # of answers, each a running request
        self.access = Access(settings, self._rules, self._recorder)
        self._moving_refs = MovingRefs(self._lookup, self.versions, self.metrics)
        self._tasks: list[asyncio.Task[None]] = []
        self.shadows = Shadows(engine, self.versions, self._lookup.find, self.access.running)
        self.versions.make_way = self.shadows.make_way
        self.ready = False

    async def start(self) -> None:
        """Start the engine, and watch tags from then on.

        Raises:
            LocalIOError: The engine cannot be started.
            RefusedError: The engine cannot be started with these settings.
        """
        started = time.monotonic()
        if self.settings.remote and any(route.rollout for route in self.routes.routes.values()):
            problem = "has a rollout, which needs a registry that this gateway may write"
            hint = "Serve the registry itself, on its machine or from its database, in place of the remote"
            raise RefusedError(str(self.settings.routes), problem, hint, code="rollout-needs-registry")
        await asyncio.to_thread(self._recorder.start)
        try:
            await self._lookup.check()
            await self._check_base_name()
            await self._warn_of_missing_names()
        except RefusedError:
            raise
        except AdapterhubError as error:
            log.warning("%s; until it is there, the base alone is served", error)
        await self.engine.start()
        priorities.warn_if_unused(self.routes, self.engine)
        await self.rollouts.refresh(self.routes)
        await self._warm_routes.refresh(self.routes)
        self.ready = True
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self.access.keep_counted())]
        took = round(time.monotonic() - started, 1)
        log.info("%s is ready after %.1f s", self.engine.name, took, extra={"fields": {"engine": self.engine.name, "s": took}})

    async def _check_base_name(self) -> None:
        """Raise RefusedError for a base with the name of an adapter, for which it would answer."""
        with suppress(UsageError, NotFoundError):  # not the name of an adapter
            for part in self._parse(self.settings.base_name):
                await self._lookup.find(part.ref)
                if part.ref.name in self.settings.allowed:
                    location, problem = self.settings.base_name, "is the name of the base and of an adapter"
                    raise RefusedError(location, problem, "Give the base another one", code="name-of-base-and-adapter")

    async def _warn_of_missing_names(self) -> None:
        """Log which names and patterns match no adapter now, so that nobody takes the base for one of them."""
        patterns = self.settings.allowed.patterns
        if self.settings.remote and (not patterns or any(map(is_pattern, patterns))):
            log.info("/v1/models lists names at a remote once they have been asked for")
        if missing := [pattern for pattern in patterns if not await self._has_match(pattern)]:
            rest = "" if len(missing) < len(patterns) else "; until one is pushed, the base alone is served"
            log.warning("no adapter matches %s%s", ", ".join(missing), rest)

    async def _has_match(self, pattern: str) -> bool:
        """Return whether an adapter matches a pattern now; True for what a remote would have to list, which few can."""
        if self.settings.remote and is_pattern(pattern):
            return True
        try:
            if self.settings.remote:
                await self._lookup.find(Ref.parse(pattern))
                return True
            return bool(await self._lookup.list_refs(AllowedNames((pattern,))))
        except NotFoundError:
            return False

    async def close(self) -> None:
        """Stop the engine, and release all versions."""
        self.ready = False
        await asyncio.to_thread(self._recorder.close)  # first, because the engine may take its time
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.shadows.close()
        await self.versions.close()
        await self.engine.close()
        self._lookup.close()
        self.rollouts.close()
        self.access.close()
        self._leases.close()

    async def not_ready_reason(self) -> str:
        """Return why requests are not answered now, in words for everybody; empty if they are."""
        if not self.ready:
            return "the engine is starting"
        if not await self.engine.healthy():
            return "the engine does not answer"
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOKUP_SECONDS):
                if await self._lookup.can_find():
                    return ""
        return "names cannot be looked up"

    def states(self) -> dict[str, object]:
        """Return the states of its parts, for `/ready`."""
        return {"engines": self.engine.states()} if isinstance(self.engine, EnginePool) else {}

    @property
    def routes(self) -> Routes:
        """The routes and the keys."""
        return self._rules.routes

    def reload(self) -> None:
        """Read the routes and the policy again, and check all versions against them; a malformed file changes nothing."""
        self._rules.read()
        priorities.warn_if_unused(self.routes, self.engine)
        if isinstance(self.engine, EnginePool):
            self.engine.change(self.routes.engines)
        elif self.routes.engines:
            log.error("the engines of the route file are not used: this gateway was started with an engine of its own")
        self.versions.check_again()  # even without a change here: keys of signers or the registry's policy may differ

    # ---- access

    @contextmanager
    def admit(self, key: Key | None) -> Iterator[None]:
        """Count a request until it ends; ProblemError if the engine has not started, or there are too many."""
        if not self.ready:
            raise ProblemError(503, "The engine is starting", code=DOWN, seconds=2)
        with self.access.admit(key), self.metrics.running_requests.track_inprogress():
            self.shadows.relieve()
            yield

    @asynccontextmanager
    async def enter(self, request: GatewayRequest) -> AsyncIterator[None]:
        """Find the key of a request, and count the request until the context ends."""
        request.key = self.access.key_of(request.headers)
        request.has_token_limits = request.key is not None and request.key.has_token_limits
        with self.admit(request.key):
            yield

    async def settle(self, request: GatewayRequest) -> None:
        """Count the tokens of an answer for its key, at other gateways too."""
        self._count_for_key(request, request.tokens)

    def record_end(self, request: GatewayRequest, status: int, first: float | None, seconds: float) -> None:
        """Record a request that has ended."""
        self.metrics.count(request.label, request.path, status, first, seconds)
        self.record_tokens(request, request.tokens)
        self.record_outcome(request, request.outcome(status, first, seconds))
        self.record_answer(request, status, seconds, request.tokens, request.usage.answer_id if request.usage else "")

    def record_answer(self, request: GatewayRequest, status: int, seconds: float, tokens: TokenCounts, answer_id: str) -> None:
        """Add an answer of the engine to the log of answers."""
        if not request.engine:
            return
        key = request.key.name if request.key else ""
        facts = (request.version[:_MAX_VERSION], request.route, request.arm, request.engine, request.path, status, seconds)
        self._recorder.add_answer(AnswerRecord(request.id, answer_id, time.time(), key, *facts, tokens.prompt, tokens.answer))

    async def find_answer(self, key: Key | None, ident: str) -> tuple[AnswerRecord, Feedback | None]:
        """Return the newest answer to a key with an id, and its feedback; ProblemError if there is none.

        It is waited for only while a request runs, or another gateway has the same record.
        """
        self._lookups += 1
        try:
            for seconds in (0.0, *_WAITS_FOR_ANSWER):
                await asyncio.sleep(seconds)
                may_come = self.has_unrecorded() or await asyncio.to_thread(self._recorder.has_company)
                answer = await asyncio.to_thread(self._recorder.find_answer, ident, key.name if key else "")
                if answer is not None:
                    return answer
                if not may_come:
                    break
        finally:
            self._lookups -= 1
        message = f"No answer with the id {printable(ident[:80])!r} is recorded here for this client"
        raise ProblemError(404, message, code="answer_not_found", param="id")

    def has_unrecorded(self) -> bool:
        """Return whether an answer runs, or is not recorded yet."""
        return self.access.running() > self._lookups

    async def add_feedback(self, key: Key | None, ident: str, score: float, label: str, comment: str) -> AnswerRecord:
        """Record a client's feedback on an answer to it: the last is kept, and only the first counts in a rollout."""
        await self.find_answer(key, ident)  # which may wait, and holds nobody up
        async with self._adding_feedback:  # else two requests at once would both find that they are the first
            answer, earlier = await self.find_answer(key, ident)
            place = (answer.request, answer.key, answer.version, answer.route, answer.arm)
            feedback = Feedback(*place, time.time(), score, label, comment if self.settings.keep_text else "")
            self._recorder.add_feedback(feedback)
        if earlier is None:
            self.metrics.count_feedback(answer.version, answer.route, answer.arm, is_bad=feedback.is_bad)
            self.rollouts.add_feedback(feedback)
        return answer

    def record_outcome(self, request: GatewayRequest, outcome: AnswerOutcome | None) -> None:
        """Record how a request was answered, for the rollout that chose its version."""
        if request.choice is not None and outcome is not None:
            request.choice.finish(outcome)

    def record_tokens(self, request: GatewayRequest, tokens: TokenCounts) -> None:
        """Count the tokens of a request, also against the budget of its key."""
        self._count_for_key(request, tokens)
        key_name = request.key.name if request.key else ""
        self.metrics.count_tokens(request.label, key_name, request.route, request.arm, tokens)
        if request.engine:
            self._recorder.add(
                key=key_name,
                version=request.label,
                route=request.route,
                arm=request.arm,
                engine=request.engine,
                path=request.path,
                tokens=tokens,
            )
        if request.key is not None and request.key.has_token_limits:
            self.access.end_tokens(request.key, request.reserved)
            request.reserved = ReservedTokens()

    def _count_for_key(self, request: GatewayRequest, tokens: TokenCounts) -> None:
        """Count the tokens of a request against the limits of its key, in place of those that it reserved."""
        if request.key is not None and request.key.has_token_limits:
            self.access.count_tokens(request.key, request.reserved, tokens.total)

    def begin_copy(self, request: GatewayRequest, body: Mapping[str, Any]) -> RequestCopy | None:
        """Return a copy of a request for the shadow of its route; None for no copy."""
        route = self.routes.routes.get(request.route)
        if route is None or route.shadow is None:
            return None
        return self.shadows.begin(route.name, route.shadow, request.engine_path, body, request.headers)

    # ---- versions

    @asynccontextmanager
    async def open_versions(self, request: GatewayRequest, identifiers: Mapping[str, str]) -> AsyncIterator[Blend]:
        """Find the versions that a request means, and keep them in the engine until the context ends."""
        if request.key is not None and request.key.has_token_limits:
            request.reserved = self.access.reserve(request.key, request.expected_tokens)
        with spans.span("resolve"):
            parts = await self._resolve_parts(request, identifiers)
        is_blend = len(parts) > 1 or any(weight != 1 for _, weight in parts)
        request.version = self.version_of(parts)
        request.deprecated = deprecations.header_of(version for version, _ in parts)
        request.label = "blend" if is_blend else request.version
        # Refused here, because an engine without blends would answer with the first version.
        if is_blend and not self.engine.can_blend:
            raise ProblemError(400, f"{self.engine.name} answers with one version, not with a blend", param="model")
        with AdapterRequest(self.metrics, request.model if parts else "") as counted:
            async with self.versions.use(parts) as blend:
                counted.begin_answer()
                yield blend

    async def _resolve_parts(self, request: GatewayRequest, identifiers: Mapping[str, str]) -> VersionParts:
        """Return the versions that a request means at this moment, each once."""
        model, key = request.model, request.key
        route = self.routes.routes.get(model)
        if route is None and model == self.settings.base_name:
            self._check_allowed(key, model, model)
            return ()
        if route is not None:
            self._check_allowed(key, model, model)
            request.route, key_name = model, key.name if key else ""
            if candidate := await self._choose_by_rollout(route, request, identifiers, key_name):
                return ((candidate, 1.0),)
            request.arm = request.choice.arm if request.choice else route.choose(request.headers, identifiers, key_name)
            parsed = model_names.parse(request.arm)
        else:
            parsed = self._parse(model)
            for part in parsed:
                self._check_allowed(key, part.ref.name, model)
                self.settings.allowed.check(part.ref)
        # A version that occurs several times in a blend gets the sum of its weights.
        weights: dict[ResolvedVersion, float] = {}
        for part in parsed:
            version = await self._moving_refs.find(part.ref)
            weights[version] = weights.get(version, 0.0) + part.weight
        return tuple(weights.items())

    async def _choose_by_rollout(
        self, route: Route, request: GatewayRequest, identifiers: Mapping[str, str], key: str
    ) -> ResolvedVersion | None:
        """Return the candidate of the route's rollout if that is to answer; None if the route's own target is."""
        choice = request.choice = self.rollouts.choose(route, request.headers, identifiers, key, request=request.id)
        if choice is None or choice.ref is None:
            return None
        try:
            candidate = await self._lookup.find(choice.ref)
        except RefusedError as error:
            if error.code != withdrawals.CODE:
                raise
            self.rollouts.stop(route.name, error.what)
            request.choice = None
            return None
        request.arm = choice.arm
        return candidate

    def _check_allowed(self, key: Key | None, name: str, model: str) -> None:
        """Raise ProblemError unless the key allows the name."""
        if key is not None and name not in key.allowed:
            # A malformed ref gets the same error as for a client that may use all names.
            self._parse(model)
            raise not_served(model)

    def _parse(self, model: str) -> tuple[model_names.BlendPart, ...]:
        """Parse a `model` with the gateway's namespace and remote."""
        return model_names.parse(model, namespace=self.settings.allowed.namespace, remote=self.settings.remote_name)

    def version_of(self, parts: VersionParts) -> str:
        """Return the version that an answer states as its source."""
        if not parts:
            return self.settings.base_name
        return "+".join(version.model if weight == 1 else f"{version.model}*{weight:.15g}" for version, weight in parts)

    def _prepare(self, version: ResolvedVersion) -> PreparedVersion:
        """Prepare a version for the engine, and hold a lease on it; runs in a thread."""
        base, address = self.settings.base, self._lookup.address(version)
        runtime = cast(RuntimeName, self.engine.runtime)
        served = resolving.resolve(address, runtime=runtime, base=base, workspace=self._workspace)
        served = replace(served, name=version.name)  # without the prefix that the remote's URL adds
        self._lease.add(served)
        return served

    # ---- listing

    async def list_models(self, key: Key | None) -> list[tuple[str, ResolvedVersion | None]]:
        """Return the names that a client may ask for, with the versions that they mean now; None for the base and routes."""
        allowed = key.allowed if key else AllowedNames()
        own_names = [name for name in (self.settings.base_name, *self.routes.routes) if name in allowed]
        refs = await self._lookup.list_refs(self.settings.allowed)
        return [*((name, None) for name in own_names), *((ref, version) for ref, version in refs if version.name in allowed)]

    async def resolve_model(self, request: GatewayRequest) -> VersionParts:
        """Return the versions that a name means for a client."""
        return await self._resolve_parts(request, {})

    # ---- watching rules and moving tags

    async def _watch(self) -> None:
        """Watch the files of rules, the tags in use and those of routes, and prepare the versions they have moved to."""
        while True:
            # Polled rather than watched: this works on every file system, and SIGHUP reloads at once.
            if self._rules.have_changed():
                self.reload()
            await self.rollouts.refresh(self.routes)
            try:
                await self._warm_routes.refresh(self.routes)
            except Exception:
                log.exception("the warm routes cannot be checked; it will be tried again")
            await self._moving_refs.refresh(self.routes.routes.values())
            await self.versions.forget_idle()
            await asyncio.sleep(self.settings.poll)
