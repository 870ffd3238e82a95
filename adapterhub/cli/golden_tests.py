"""`adapterhub eval --tests`: golden tests, as a table, as JSON and as JUnit's XML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.errors import UsageError

from . import compared_tests, environment, gate_options, output, signed_results
from .environment import prepare_torch
from .options import Settings
from .output import Column
from .registry_choice import workspace

if TYPE_CHECKING:
    from adapterhub.operations.golden_tests import EndpointOptions, TestedVersion

    from .signing_options import SignerOption

_MAX_FAILURES = 10  # in a table


def run(
    settings: Settings,
    source: str,
    *,
    tests: str,
    against: str | None,
    base: str | None,
    url: str | None,
    served_as: str | None,
    trust_name: bool,
    samples: int,
    temperature: float,
    seed: int,
    max_tokens: int,
    programs: Sequence[str],
    junit: str | None,
    gate_texts: Sequence[str],
    name: str,
    no_record: bool,
    signer: SignerOption | None,
) -> int:
    """Run the golden tests of a file and report them.

    Returns:
        0 if every gate holds, or without gates every test; else 1.
    """
    from adapterhub.manifest.measurement import check_name
    from adapterhub.operations import golden_tests
    from adapterhub.registry.releases.metric_gates import TEST_GATES

    # Checked before the answers, which can take minutes.
    claims, metric_gates = compared_tests.split_gates(gate_texts, against)
    parsed_gates = gate_options.parse(metric_gates, TEST_GATES)
    check_name(name, "--name")
    commands = golden_tests.parse_commands(programs)
    if junit is not None:
        atomic.check_free(Path(junit), folder=False, replace=True)
    endpoint = _endpoint(url, base=base, served_as=served_as, trust_name=trust_name)
    if endpoint is None:
        prepare_torch()
    if against is not None:
        _check_against(against, base=base, url=url, served_as=served_as)
        if against != compared_tests.BASE:
            golden_tests.check_version(against, workspace(settings))
    answer_tests = partial(
        golden_tests.run_tests,
        tests=tests,
        base=base,
        endpoint=endpoint,
        sampling=golden_tests.Sampling(samples, temperature, seed, max_tokens),
        commands=commands,
        workspace=workspace(settings),
    )
    tested = answer_tests(source, record=None if no_record else name)
    comparison = compared_tests.compare(tested, against, claims, answer_tests) if against is not None else None
    if junit is not None:
        _write_junit(Path(junit), tested, source)
    verdicts = gate_options.verdicts(parsed_gates, tested.report.metrics)
    gates_hold = all(passed for _, passed in verdicts) and (comparison is None or comparison.ok)
    ok = gates_hold if gate_texts else not tested.report.failures
    gate_documents = gate_options.documents(verdicts, tested.report.metrics)
    gate_documents += comparison.gate_documents() if comparison else []
    evaluation = tested.evaluation(name)
    signed = signed_results.sign(
        settings,
        signer,
        tested.ref,
        tested.digest,
        [evaluation],
        ok=ok,
        gates=gate_documents,
        failed={result.case.id for result in tested.report.failures},
    )
    document = {
        "ok": ok,
        "source": source,
        "ref": tested.ref,
        "digest": tested.digest,
        **evaluation.document(),
        "results": [result.document() for result in tested.report.results],
        "recorded": tested.ref if tested.recorded else None,
        "against": comparison.document() if comparison else None,
        "gates": gate_documents,
        "attestations": signed,
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _text(tested, verdicts, comparison, signed))
    return 0 if ok else 1


def _endpoint(url: str | None, *, base: str | None, served_as: str | None, trust_name: bool) -> EndpointOptions | None:
    """Return the endpoint that answers; None for a model here. UsageError for options that contradict each other."""
    from adapterhub.operations.golden_tests import EndpointOptions

    if url is None:
        if served_as or trust_name:
            raise UsageError("--served-as and --trust-name", "require --url", "Pass --url too", code="conflicting-options")
        return None
    if base is not None:
        raise UsageError("--url", "answers in place of --base", "Leave one of them out", code="conflicting-options")
    return EndpointOptions(url, os.environ.get(environment.ENGINE_KEY, ""), served_as or "", trust_name)


def _write_junit(path: Path, tested: TestedVersion, source: str) -> None:
    """Write the results as JUnit's XML, about the version by its digest."""
    from adapterhub.evidence import junit_report
    from adapterhub.operations import evaluation_log

    version = f"{evaluation_log.name_at(tested.ref) if tested.ref else source}@{tested.digest}"
    with atomic.pending_output(path, folder=False, replace=True) as pending:
        json_file.write_text(pending, junit_report.render(tested.report, version=version))


def _check_against(against: str, *, base: str | None, url: str | None, served_as: str | None) -> None:
    """Raise UsageError where the other version could not answer."""
    if served_as is not None:
        raise UsageError("--served-as", "names one version, and --against another", "Leave it out", code="conflicting-options")
    if against == compared_tests.BASE and (url is not None or base is None):
        raise UsageError("--against", "base needs the model here", "Name it with --base", code="base-required")


def _text(
    tested: TestedVersion,
    verdicts: gate_options.Verdicts,
    comparison: compared_tests.Comparison | None,
    signed: Sequence[object],
) -> None:
    report = tested.report
    failures, metrics = report.failures, report.metrics
    if failures:
        rows = [
            [output.one_line(result.case.id), f"{result.passed}/{result.samples}", output.one_line(result.problem)]
            for result in failures[:_MAX_FAILURES]
        ]
        output.write_table((Column("FAILED"), Column("RIGHT", right=True), Column("FIRST PROBLEM", wrap=True)), rows)
        if failures[_MAX_FAILURES:]:
            output.write(output.remainder_line(len(failures) - _MAX_FAILURES, "failure"))
    share = f", {metrics['pass_rate']:.1%} of the answers right" if metrics["samples"] > metrics["cases"] else ""
    output.write(f"{metrics['passed']:.0f} of {output.plural(len(report.results), 'test')} passed{share}")
    gate_options.write(verdicts, metrics)
    if comparison is not None:
        comparison.write()
    if tested.recorded:
        output.write(f"recorded for {tested.ref}")
    signed_results.write(signed)
