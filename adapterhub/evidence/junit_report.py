"""JUnit's XML, as CI systems read it: a test suite with a test case each, and the version that it is about as a property."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from .golden_tests import CaseResult, TestReport
from .version_names import TESTS_PROPERTY, VERSION_PROPERTY


def render(report: TestReport, *, version: str) -> str:
    """Return the XML of a report; `version` is a name with the digest of its manifest."""
    failures = len(report.failures)
    head = f'<testsuite name={_attribute(report.file.name)} tests="{len(report.results)}" failures="{failures}">'
    properties = {VERSION_PROPERTY: version, TESTS_PROPERTY: report.file.digest}
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<testsuites tests="{len(report.results)}" failures="{failures}">',
            head,
            "<properties>",
            *(f'<property name="{name}" value={_attribute(value)}/>' for name, value in properties.items()),
            "</properties>",
            *map(_case, report.results),
            "</testsuite>",
            "</testsuites>",
            "",
        ]
    )


def _case(result: CaseResult) -> str:
    begin = f'<testcase classname="adapterhub" name={_attribute(result.case.id)}'
    if result.ok:
        return f"{begin}/>"
    share = f"{result.passed} of {result.samples} right: " if result.samples > 1 else ""
    return f"{begin}><failure message={_attribute(share + result.problem)}>{escape(_xml(result.answer))}</failure></testcase>"


def _attribute(text: str) -> str:
    return quoteattr(_xml(text))


def _xml(text: str) -> str:
    """Return a text whose characters XML 1.0 has (w3.org/TR/xml, "Characters"); others become U+FFFD."""
    return "".join(
        char if char in "\t\n\r" or " " <= char <= "\ud7ff" or "\ue000" <= char <= "\ufffd" or char > "\uffff" else "\ufffd"
        for char in text
    )
