"""What the specification lists is what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import adapterhub_schemas
from adapterhub.manifest import oci_manifest, schema_versions
from adapterhub.manifest.package_files import CONFIGS, LEGAL
from adapterhub_converters.adapter_files import WEIGHT_SUFFIXES
from adapterhub_converters.bases import gguf_base, hf_base

TEXT = (Path(__file__).parents[2] / "schemas" / "SPECIFICATION.md").read_text()


def section(start: str, end: str) -> str:
    return TEXT[TEXT.index(start) : TEXT.index(end)]


def words(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_numbers_of_a_base_are_a_closed_list() -> None:
    listed = words(section("A later list is a later minor version", "The keys of `text_config`"))
    assert listed == list(hf_base._NUMERIC_KEYS)
    assert set(gguf_base._CONFIG_KEYS.values()) <= {*listed}


def test_names_decide_the_media_type_by_the_listed_suffixes() -> None:
    listed = set(words(section("| suffix `.safetensors`", "| any other |")))
    assert listed >= WEIGHT_SUFFIXES | CONFIGS | {*LEGAL, "README"}
    assert {name for name in listed if not name.startswith("application/")} == WEIGHT_SUFFIXES | CONFIGS | {*LEGAL, "README"}


def test_dtypes_have_the_listed_words() -> None:
    listed = words(section("of `dtype`:", "absent for `mixed`"))[1:]
    assert dict(zip(listed[::2], listed[1::2], strict=True)) == oci_manifest._PRECISIONS


def test_the_version_is_that_of_the_schema() -> None:
    schema = adapterhub_schemas.load("adapter")
    assert schema["$id"] == schema_versions.SCHEMA_ID
    assert schema["properties"]["schema_version"]["const"] == schema_versions.CURRENT
    assert TEXT.startswith(f"# adapter.json {schema_versions.CURRENT},")


def test_every_field_that_describes_the_adapter_is_in_the_mapping_or_has_no_counterpart() -> None:
    rows = [row.split("|")[1] for row in section("| adapter.json |", "## Appendix A").splitlines() if "|" in row]
    mapped = {word.partition(".")[0] for row in rows for word in words(row)}
    alone = {
        "$schema", "schema_version", "extensions", "recipe", "understood", "numbers", "reason", "tokenizer_digest",
        "chat_template_digest",
    }  # fmt: skip
    assert set(adapterhub_schemas.load("adapter")["properties"]) == mapped | alone
