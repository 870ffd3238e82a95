"""Golden tests of an adapter that is named by path, ref or address; the tests and their checks are in `adapterhub.evidence`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.evidence import golden_tests, test_cases
from adapterhub.evidence.endpoint import Endpoint
from adapterhub.evidence.golden_tests import Answer, Answerer, TestReport
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import evaluation_log, generate, source_names, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.evidence.answer_checks import Commands
    from adapterhub.evidence.test_cases import Case
    from adapterhub.generation import Engine
    from adapterhub.manifest.measurement import Evaluation

_NO_COMMANDS: Commands = {}


@dataclass(frozen=True)
class EndpointOptions:
    """An endpoint that answers the tests.

    Attributes:
        url: Its URL, up to and with `/v1`.
        key: Its key; empty for none.
        model: The name of the version there; empty for that of the gateway, `name@sha256:…`.
        trust_name: Take its word that the name is this version, where its answers do not name the digest.
    """

    url: str
    key: str = ""
    model: str = ""
    trust_name: bool = False


@dataclass(frozen=True)
class Sampling:
    """How the tests are answered: the number of answers to each, temperature and seed of the first, and tokens of each."""

    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 256


@dataclass(frozen=True)
class TestedVersion:
    """A version, or a folder, with the results of its tests.

    Attributes:
        report: The results.
        measured_by: The program that answered, and how: as in `manifest.measurement.Evaluation.base`.
        ref: Its ref or address; None for a path.
        digest: The digest of its manifest.
        recorded: Whether the results are in the log of the version.
    """

    report: TestReport
    measured_by: dict[str, Any]
    ref: str | None
    digest: str
    recorded: bool = False

    def evaluation(self, name: str) -> Evaluation:
        """Return the results as an evaluation of that name."""
        from adapterhub.manifest.measurement import Evaluation

        file = self.report.file
        data = ({"path": file.name, "digest": file.digest},)
        return Evaluation(name, self.report.metrics, data, self.measured_by, self.report.rates)


def run_tests(
    source: StrPath | None,
    tests: StrPath,
    *,
    base: StrPath | None = None,
    endpoint: EndpointOptions | None = None,
    sampling: Sampling | None = None,
    commands: Commands = _NO_COMMANDS,
    record: str | None = None,
    workspace: Workspace | None = None,
) -> TestedVersion:
    """Answer the golden tests of a file with an adapter, and check the answers.

    Args:
        source: A folder, a file, a ref or an address; for an endpoint, a ref or an address. None for the base alone.
        tests: A `.jsonl` or `.yaml` file (`evidence.test_cases`).
        base: The model that answers with the adapter, as for `generate`; None for the one that it records.
        endpoint: Ask there, in place of a model on this machine.
        sampling: The number of answers, and how they are drawn.
        commands: The programs that tests may run, by the names that they use; nothing else is run.
        record: Record the results under this name in the log of the version, where `source` is in the registry or on a hub.
        workspace: Where names are looked up.

    Raises:
        FormatError: The file is malformed.
        UsageError: A test needs a program that `commands` does not have.
        RefusedError: The adapter cannot be run on the base, or another version answers at the endpoint.
    """
    from adapterhub.manifest.measurement import check_name

    if record is not None:
        check_name(record, "record")
    workspace, sampling = workspace or Workspace(), sampling or Sampling()
    file = test_cases.read(Path(tests))
    golden_tests.check(file, commands)
    opened = (
        _open_endpoint(source, endpoint, sampling, workspace) if endpoint else _open_local(source, base, sampling, workspace)
    )
    with opened as subject, workspace.steps("testing") as progress:
        report = golden_tests.run(
            file,
            subject.answer,
            samples=sampling.samples,
            seed=sampling.seed,
            max_tokens=sampling.max_tokens,
            commands=commands,
            progress=progress,
        )
    settings = {"samples": sampling.samples, "temperature": sampling.temperature, "seed": sampling.seed}
    measured_by = {**subject.facts, **settings, "max_tokens": sampling.max_tokens}
    tested = TestedVersion(report, measured_by, subject.ref, subject.digest)
    if record is None:
        return tested
    is_recorded = evaluation_log.record(tested.ref, tested.digest, [tested.evaluation(record)], workspace)
    return replace(tested, recorded=is_recorded)


def check_version(source: StrPath, workspace: Workspace) -> None:
    """Raise NotFoundError for a ref of the registry that is no version: before any answer is computed, which takes minutes."""
    ref = source_names.ref_of(source, workspace)
    if ref is not None:
        with workspace.open_registry() as registry:
            registry.resolve(ref)


def parse_commands(texts: Sequence[str]) -> Commands:
    """Parse `NAME=PROGRAM ARGUMENT …` of the user's own command line; no shell runs them."""
    import shlex

    commands: dict[str, list[str]] = {}
    for text in texts:
        name, _, line = text.partition("=")
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise UsageError(text[:80], str(error).lower(), "Close the quote") from error
        if not name or not words:
            raise UsageError(text[:80], "names no program", "Write NAME=PROGRAM, as in 'sql=python check.py'")
        commands[name] = words
    return commands


@dataclass(frozen=True)
class _Subject:
    """The subject of the tests: the function that answers for it, facts about that, and its ref and digest."""

    answer: Answerer
    facts: dict[str, Any]
    ref: str | None
    digest: str


@contextlib.contextmanager
def _open_endpoint(
    source: StrPath | None, options: EndpointOptions, sampling: Sampling, workspace: Workspace
) -> Iterator[_Subject]:
    if source is None:
        raise UsageError(options.url, "does not say by a digest that the base answered", "Name a model on this machine")
    version = evaluation_log.find_version(source, workspace, "whose digest the endpoint could name")
    model = options.model or version.model
    digest = "" if options.trust_name else version.digest
    endpoint = Endpoint(options.url, options.key, model, digest=digest, temperature=sampling.temperature, proxy=workspace.proxy)
    with contextlib.closing(endpoint):
        facts = {"engine": "endpoint", "model": model, **({"trusted_name": True} if options.trust_name else {})}
        yield _Subject(endpoint.answer, facts, version.place, version.digest)


@contextlib.contextmanager
def _open_local(source: StrPath | None, base: StrPath | None, sampling: Sampling, workspace: Workspace) -> Iterator[_Subject]:
    with generate.open_engine(source, base, workspace) as loaded:
        adapter = loaded.source
        digest = "" if adapter is None else adapter.digest or sources.parent(adapter).digest
        # Whoever reads the log of a hub is not to learn where the model is on this machine.
        base_name = Path(loaded.base).absolute().name if Path(loaded.base).exists() else loaded.base
        facts = {"engine": loaded.engine.name, "base": base_name}
        answerer = _engine_answerer(loaded.engine, sampling.temperature, has_adapter=adapter is not None)
        yield _Subject(answerer, facts, adapter.ref if adapter else None, digest)


def _engine_answerer(engine: Engine, temperature: float, *, has_adapter: bool) -> Answerer:
    from adapterhub.generation import Prompt, answer_prompt

    def answer(case: Case, limit: int, seed: int) -> Answer:
        *earlier, last = case.messages
        result = answer_prompt(
            engine,
            Prompt(last["content"], earlier=tuple(earlier)),
            has_adapter=has_adapter,
            compare=False,
            max_tokens=limit,
            temperature=temperature,
            seed=seed,
            on_text=lambda _adapted, _piece: None,
        )
        return Answer(result.text, result.tokens < limit)

    return answer
