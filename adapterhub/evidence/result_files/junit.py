"""JUnit's XML, as any test runner writes it; the property `adapterhub.version` of a suite says which version was tested."""

from __future__ import annotations

from pathlib import Path
from xml.parsers import expat

from adapterhub.digest import is_hex
from adapterhub_converters.errors import FormatError

from . import bounded_files
from .imported_result import CODE, ImportedResult, case_rates, evaluation_name, metric_table

_DEEPEST = 32
_PROPERTIES = ("adapterhub.version", "adapterhub.tests")


class _Suite:
    """The test cases of a file, collected by the events of a parser."""

    def __init__(self, location: str) -> None:
        self._location, self._depth = location, 0
        self.name = ""
        self.cases: list[list[str]] = []  # the name and the outcome of each
        self.properties: dict[str, set[str]] = {name: set() for name in _PROPERTIES}

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise FormatError(self._location, f"nested more than {_DEEPEST} deep", code=CODE)
        if tag == "testsuite":
            self.name = self.name or attributes.get("name", "")
        elif tag == "testcase":
            parts = (attributes.get("classname", ""), attributes.get("name", ""))
            self.cases.append([".".join(part for part in parts if part), "passed"])
        elif tag in ("failure", "error", "skipped") and self.cases:
            self.cases[-1][1] = tag
        elif tag == "property" and attributes.get("name") in self.properties:
            self.properties[attributes["name"]].add(attributes.get("value", "")[:300])

    def end(self, _tag: str) -> None:
        self._depth -= 1

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
    outcomes = [(name, outcome) for name, outcome in suite.cases if outcome != "skipped"]
    if not outcomes:
        raise FormatError(location, "has no test case that was run", code=CODE)
    passed = sum(outcome == "passed" for _, outcome in outcomes)
    errors = sum(outcome == "error" for _, outcome in outcomes)
    metrics = {"pass_rate": passed / len(outcomes), "passed": passed, "samples": len(outcomes), "errors": errors}
    versions, data = (suite.properties[name] for name in _PROPERTIES)
    digests = [digest for digest in data if digest.startswith("sha256:") and is_hex(digest[7:])]
    return [
        ImportedResult(
            "JUnit",
            "",
            evaluation_name(suite.name or "junit"),
            metric_table(metrics.items(), location),
            digests[0] if len(digests) == 1 else "",
            frozenset(versions or {"an unnamed version"}),
            cases=case_rates((name, float(outcome == "passed")) for name, outcome in outcomes),
        )
    ]
