"""A card that a hub understands, from which the README comes back byte for byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapterhub.manifest import derive
from adapterhub.manifest.document import AdapterManifest, BaseInfo
from adapterhub.remotes.hub import hub_files
from tests.conftest import need_module
from tests.support.adapters import write_adapter

MANIFEST = AdapterManifest.salvage({
    "base": {"repo": "org/base"}, "format": "peft", "task": "CAUSAL_LM", "method": "dora", "license": "Apache-2.0", "r": 8,
})  # fmt: skip

CARDS = [
    b"",
    b"# Title\n",
    b"# Title\r\nno end",
    b"---\nlicense: mit\n---\n# Title\n",
    b"---\r\nlicense: mit\r\ntags:\r\n  - mine\r\n---\r\n# Title\r\n",
    b"---\nbase_model: other/model\n'library_name': mine\n---\n",
    b"---\n---\n",
    b"---\nbase_model:\n- org/one\n- org/two\n---\n",
    b"---\n# a comment\n\nmodel-index:\n- name: x\n  results: []\n---\ntext\n---\nmore\n",
    b"---\n{a: b}\n---\n",
    b"---\nnever ends",
    b"---\ntitle\n---\n",
    b"\xef\xbb\xbf---\nlicense: mit\n---\n",
    b"\n---\nlicense: mit\n---\n",
    b"\xff\xfe binary",
    b"---\n# adapterhub: added\nx: y\n# adapterhub: end of what was added\n---\n",
    b"---\n# adapterhub: added with the front matter\nx: y\n# adapterhub: end of what was added\n---\nmine\n",
]
pieces = st.lists(
    st.sampled_from(
        [b"---\n", b"---\r\n", b"# adapterhub: added\n", b"# adapterhub: end of what was added\n", b"license: mit\n", b"text\n",
         b"# adapterhub: added with the front matter\n", b"\r\n", b"- x\n", b"tags:\n"]
    ),
    max_size=8,
)  # fmt: skip


@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode), pieces.map(b"".join)))
@example(CARDS[14])
@example(CARDS[15])
def test_any_readme_comes_back(readme: bytes) -> None:
    card = hub_files.complete_card(readme, MANIFEST)
    assert readme in (card, hub_files.original_readme(card))


@pytest.mark.parametrize("readme", CARDS)
def test_a_completed_card_has_every_field_and_preserves_existing_ones(readme: bytes) -> None:
    need_module("huggingface_hub")
    from huggingface_hub import ModelCard

    card = hub_files.complete_card(readme, MANIFEST)
    assert readme in (card, hub_files.original_readme(card))
    if card == readme:
        assert readme[:3] in (b"---", b"\xef\xbb\xbf", b"\n--", b"\xff\xfe ")
        return
    after = ModelCard(card.decode()).data.to_dict()
    before = ModelCard(readme.decode(), ignore_metadata_errors=True).data.to_dict() if readme.startswith(b"---") else {}
    added = {"base_model": "org/base", "library_name": "peft", "tags": ["lora", "dora"], "license": "apache-2.0"}
    added |= {"base_model_relation": "adapter", "pipeline_tag": "text-generation"}
    assert after == {**added, **before}
    body = (
        readme.replace(b"\r\n", b"\n").partition(b"\n---\n")[2] if readme.startswith(b"---") else readme.replace(b"\r\n", b"\n")
    )
    assert ModelCard(card.decode()).text.replace("\r\n", "\n").strip() == body.decode().strip()


@pytest.mark.parametrize(
    ("spdx", "expected"),
    [
        ("MIT", {"license": "mit"}),
        ("GPL-3.0-only", {"license": "gpl-3.0"}),
        ('A license: of "ours"', {"license": "other", "license_name": "a-license-of-ours"}),
    ],
)
def test_a_card_is_written_for_an_adapter_without_one(tmp_path: Path, spdx: str, expected: dict[str, str]) -> None:
    need_module("huggingface_hub")
    from huggingface_hub import ModelCard

    folder = write_adapter(tmp_path / "sql")
    (folder / "README.md").unlink()
    declared = {"license": spdx, "description": "Writes SQL: well.", "name": "x: y"}
    manifest = derive.describe(folder, declared=declared)
    card = ModelCard(hub_files.write_card("sql", manifest).decode())
    assert card.data.to_dict().items() >= {"base_model": "org/base", "tags": ["lora"], **expected}.items()
    assert card.text.startswith("\n# x: y\n\nWrites SQL: well.\n\nA LoRA adapter of rank 2 for org/base.")
    assert hub_files.is_written_card(hub_files.write_card("sql", manifest))


@pytest.mark.parametrize("path", ["/home/me/models/base", "./base", "'../x'", "a/b/c", "C:\\models\\x"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_base_that_is_a_path_is_the_right_one_on_the_hub_and_comes_back(path: str, end: str) -> None:
    need_module("huggingface_hub")
    from huggingface_hub import ModelCard

    readme = f"---\nlibrary_name: peft\nbase_model: {path}\ntags:\n- mine\n---\nbase_model: /x\n".replace("\n", end).encode()
    card = hub_files.complete_card(readme, MANIFEST)
    data = ModelCard(card.decode()).data.to_dict()
    assert (data["base_model"], data["tags"]) == ("org/base", ["mine"])
    assert hub_files.original_readme(card) == readme
    nobody = dataclasses.replace(MANIFEST, base=BaseInfo())
    assert f"\nbase_model: {path}{end}".encode() in hub_files.complete_card(readme, nobody)
