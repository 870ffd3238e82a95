"""A bill of materials as one page of HTML, for people who have no viewer of CycloneDX."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from adapterhub.trust.cyclonedx_bom import PREFIX, SPEC, UNRECORDED, Bill
from adapterhub_converters import display


def page(bill: Bill) -> str:
    """Return the bill as one page of HTML, without scripts and without anything loaded from elsewhere."""
    component = bill.document["metadata"]["component"]
    title = "/".join(filter(None, (component.get("group"), component["name"])))
    heading = f"<h1>Bill of materials: {html.escape(display.printable(title))}</h1>"
    body = "\n".join([heading, *_sections(bill, component)])
    # The names in a bill come from others: scripts are forbidden in case an escape is missing.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Bill of materials</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#111;background:#fff}"
    "table{border-collapse:collapse;margin:0 0 1.5em;width:100%}caption{text-align:left;font-weight:600;padding:.4em 0}"
    "td,th{border-bottom:1px solid #ccc;padding:.25em .6em .25em 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}"
)


def _sections(bill: Bill, component: Mapping[str, Any]) -> Iterator[str]:
    identification = [("version", component["version"]), ("description", component.get("description"))]
    identification += [("specification", f"CycloneDX {SPEC}"), ("serial number", bill.document["serialNumber"])]
    yield display.table(identification, caption="Adapter")
    yield display.table(
        [("combined", bill.license.expression or UNRECORDED), *(("", reason) for reason in bill.license.reasons)],
        caption="License: all that are recorded, joined; no legal advice",
    )
    ancestors = component["pedigree"]["ancestors"]
    yield display.table([_row(ancestor) for ancestor in ancestors], head=_HEAD, caption="Made from")
    if sets := bill.document["components"]:
        yield display.table([_row(data_set) for data_set in sets], head=_HEAD, caption="Training data")
    metrics = component.get("modelCard", {}).get("quantitativeAnalysis", {}).get("performanceMetrics", [])
    if metrics:
        yield display.table([(metric["type"], metric["value"]) for metric in metrics], caption="Recorded metrics")
    files = [(name, digest, facts) for name, _, digest, _, facts in map(_row, component.get("components", ()))]
    yield display.table(files, head=("name", "sha256", "facts"), caption="Files")
    properties = [(property_["name"].removeprefix(PREFIX), property_["value"]) for property_ in component["properties"]]
    yield display.table([property_ for property_ in properties if not property_[0].startswith("license:")], caption="Facts")


_HEAD = ("name", "version", "sha256", "license", "facts")


def _row(component: Mapping[str, Any]) -> tuple[object, ...]:
    hashes, licenses = component.get("hashes") or [{}], component.get("licenses") or [{}]
    facts = ", ".join(f"{fact['name'].rpartition(':')[2]} {fact['value']}" for fact in component.get("properties", ()))
    name = "/".join(filter(None, (component.get("group"), component["name"])))
    version = component.get("version") if not str(component.get("version", "")).startswith("sha256:") else ""
    return (name, version, hashes[0].get("content"), licenses[0].get("expression") or UNRECORDED, facts)
