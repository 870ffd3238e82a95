"""JUnit's XML, as any test runner writes it; the property `adapterhub.version` of a suite says which version was tested.

A property is about the cases of its suite and of suites in it, or about its only case. Other cases are of an unnamed version.
"""

from __future__ import annotations

from pathlib import Path
from xml.parsers import expat

from adapterhub.digest import is_hex
from adapterhub.evidence.version_names import TESTS_PROPERTY, VERSION_PROPERTY
from adapterhub_converters.errors import FormatError

from . import bounded_files
from .imported_result import CODE, ImportedResult, case_rates, evaluation_name, metric_table

_MAX_DEPTH = 32
_OUTCOMES = ("passed", "skipped", "failure", "error")  # the last one counts, of several for one test case
_UNNAMED = "an unnamed version"


class _Suite:
    """The test cases of a file, collected by the events of a parser."""

    def __init__(self, location: str) -> None:
        self._location = location
        self.name = ""
        self.cases: list[list[str]] = []  # the name and the outcome of each
        self.data: set[str] = set()
        self.versions: set[str] = set()
        # Of each open element: its tag, the versions that it names, and whether a case in it relies on an element around it.
        self._open: list[tuple[str, set[str], list[bool]]] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if len(self._open) == _MAX_DEPTH:
            raise FormatError(self._location, f"nested more than {_MAX_DEPTH} deep", code=CODE)
        is_in_case = any(open_tag == "testcase" for open_tag, _, _ in self._open)
        if tag == "testsuite":
            self.name = self.name or attributes.get("name", "")
        elif tag == "testcase":
            parts = (attributes.get("classname", ""), attributes.get("name", ""))
            self.cases.append([".".join(part for part in parts if part), "passed"])
        elif tag in _OUTCOMES and is_in_case:
            self.cases[-1][1] = max(self.cases[-1][1], tag, key=_OUTCOMES.index)
        elif tag == "property" and self._open:
            value = attributes.get("value", "")[:300]
            if attributes.get("name") == VERSION_PROPERTY:
                self.versions.add(value)
                # The element around `properties` has it.
                is_wrapped = self._open[-1][0] == "properties" and len(self._open) > 1
                self._open[-2 if is_wrapped else -1][1].add(value)
            elif attributes.get("name") == TESTS_PROPERTY:
                self.data.add(value)
        self._open.append((tag, set(), [tag == "testcase"]))

    def end(self, _tag: str) -> None:
        # A suite may name its version after its cases, so that only its end tells.
        _, versions, [needs_version] = self._open.pop()
        if not needs_version or versions:
            return
        if self._open:
            self._open[-1][2][0] = True
        else:
            self.versions.add(_UNNAMED)

    def refuse_doctype(self, *_: object) -> None:
        raise FormatError(self._location, "has a document type, whose entities could grow", "Leave it out", code=CODE)


def read(path: Path) -> list[ImportedResult]:
    """Return the one result: the share of the test cases that passed, without those that were skipped."""
    location = str(path)
    suite, parser = _Suite(location), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = suite.start, suite.end
    parser.StartDoctypeDeclHandler = suite.refuse_doctype
    try:
        parser.Parse(bounded_files.document_bytes(path), True)
    except expat.ExpatError as error:
        raise FormatError(
            location, f"not valid XML ({expat.ErrorString(error.code)} in line {error.lineno})", code=CODE
        ) from error
    except (LookupError, ValueError) as error:  # as expat's encodings in Python are
        raise FormatError(location, f"not valid XML ({str(error)[:80]})", "Write it in UTF-8", code=CODE) from error
    outcomes = [(name, outcome) for name, outcome in suite.cases if outcome != "skipped"]
    if not outcomes:
        raise FormatError(location, "has no test case that was run", code=CODE)
    passed = sum(outcome == "passed" for _, outcome in outcomes)
    errors = sum(outcome == "error" for _, outcome in outcomes)
    metrics = {"pass_rate": passed / len(outcomes), "passed": passed, "samples": len(outcomes), "errors": errors}
    digests = [digest for digest in suite.data if digest.startswith("sha256:") and is_hex(digest[7:])]
    return [
        ImportedResult(
            "JUnit",
            "",
            evaluation_name(suite.name or "junit"),
            metric_table(metrics.items(), location),
            digests[0] if len(digests) == 1 else "",
            frozenset(suite.versions),
            cases=case_rates((name, float(outcome == "passed")) for name, outcome in outcomes),
        )
    ]
