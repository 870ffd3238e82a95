"""Scanning files for what could run code or mislead: nothing is run, nothing sound is reported."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from adapterhub.checks import CODES, SCAN
from adapterhub.checks.scan import archives, configs, markup, pickle_opcodes, scan, templates
from adapterhub_converters.errors import NotFoundError, RefusedError
from tests.conftest import ROOT, need_module
from tests.support import malicious
from tests.support.adapters import write_adapter
from tests.support.byte_tokenizer import TEMPLATE

PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0IEND\xaeB`\x82"


def codes(path: Path) -> set[str]:
    return {problem.code for problem in scan(path).problems}


def found(folder: Path, name: str, data: bytes | str) -> set[str]:
    """The codes of a file next to a sound adapter."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return {problem.code for problem in scan(folder).problems if problem.file == name}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sound")


def test_a_sound_adapter_has_nothing_to_report(sound: Path) -> None:
    (sound / "README.md").write_text(
        "# Ein Adapter 👩‍🔬\n\n```html\n<script>shown();</script>\n```\nSee [the site](https://a.example).\n"
    )
    (sound / "chat_template.jinja").write_text(TEMPLATE)
    (sound / "plot.png").write_bytes(PNG)
    (sound / "LICENSE").write_text("MIT")
    (sound / "tokenizer.model").write_bytes(b"\0" * 4096 + b"<html><script><?php%PDF-1.7")
    (sound / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<script": 1, "\u200b": 2}}}))
    report = scan(sound)
    assert [problem for problem in report.problems if problem.code != "template-text"] == []
    assert report.facts["files"] == 8


def test_every_malicious_file_is_an_error(tmp_path: Path) -> None:
    assert [path.name for path in malicious.corpus(tmp_path) if scan(path).ok] == []


def test_a_pickle_is_found_by_what_it_does_and_names_what_it_calls(sound: Path) -> None:
    for protocol in range(6):
        (sound / "notes.txt").write_bytes(malicious.pickled(protocol))
        (problem,) = [one for one in scan(sound).problems if one.code == "pickle"]
        assert problem.what == f"a pickle that calls {os.system.__module__}.system when it is loaded"


@pytest.mark.parametrize(
    "text",
    [
        "cats\nare\nnice\n",
        "I love it.\n",
        "(((((",
        "N.",
        "config\nfile\nR",
        "colors\nred\nblue\n",
        "}q\x00.",
        "# A card\n",
        "",
        "S'x'\n.",
    ],
)
def test_texts_that_begin_with_opcodes_are_not_pickles(text: str) -> None:
    assert pickle_opcodes.find(text.encode()) is None


def test_a_pickle_of_data_alone_is_a_pickle(sound: Path) -> None:
    assert "pickle" in found(sound, "data.txt", pickle.dumps({"a": 1}))


def test_a_pickle_that_never_ends_takes_bounded_work() -> None:
    assert pickle_opcodes.find(b"\x80\x02" + b"(" * (4 << 20)) is not None


def test_a_pickle_that_names_one_text_again_and_again_has_it_once() -> None:
    text = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000 + b"\x94"
    pickle_ = pickle_opcodes.find(b"\x80\x04" + text + b"h\0h\0\x93" * 100 + b".")
    assert pickle_ is not None
    assert sum(map(len, pickle_.imports)) < 100_000


def test_a_config_whose_keys_are_long_has_them_once() -> None:
    document = {"k" * 100_000: {"_target_": ["x" * 1_000] * 1_000, **{str(number): {} for number in range(100)}}}
    tracemalloc.start()
    try:
        assert len(list(configs.faults(document))) == 1
        assert tracemalloc.get_traced_memory()[1] < 500_000  # bytes; each key with all of its path would be 10 MB
    finally:
        tracemalloc.stop()


def test_a_zip_is_an_archive_however_its_members_are_broken(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.dat", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"hello")
    raw = bytearray((tmp_path / "a.dat").read_bytes())
    raw[35] = 0xFF  # LZMA's properties
    (tmp_path / "a.dat").write_bytes(raw)
    assert "archive" in codes(tmp_path / "a.dat")


def test_a_zip_is_not_read_by_a_second_directory_that_is_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_MAX_DIRECTORY", 1_000)
    member = struct.pack("<4s4B4H3L5H2L", b"PK\x01\x02", 20, 0, 20, *(0,) * 15)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 100, 100, 4_600, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4_600, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(member + end64 + locator), 0, 0)
    (tmp_path / "a.dat").write_bytes(member * 100 + end64 + locator + end)
    listed: list[int] = []

    def infolist(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        listed.append(len(archive.filelist))
        return []

    monkeypatch.setattr(zipfile.ZipFile, "infolist", infolist)
    scan(tmp_path / "a.dat")
    assert not listed
    (tmp_path / "a.dat").write_bytes(malicious.zipped(a=b"x"))
    scan(tmp_path / "a.dat")
    assert listed == [1]


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("weights.safetensors", b"PK\x03\x04" + b"\0" * 64, "disguised"),
        ("weights.gguf", b"GGML" + b"\0" * 64, "disguised"),
        ("weights.gguf", b"GGUF" + b"\0" * 64, "malformed"),
        ("plot.png", b"GIF89a", "disguised"),
        ("plot.png", PNG + b"PK", "trailing-data"),
        ("plot.png", PNG[:-8], "malformed"),
        ("notes.txt", b"\xff\xfe\0", "disguised"),
        ("state.dat", b"\xff\xfe\0", "unknown-binary"),
        ("train.log", "epoch 1", "left-out"),
        ("config.json", "{", "malformed"),
        ("notes.txt", "  <!DOCTYPE html><p>", "polyglot"),
        ("notes.txt", b"hello" + malicious.zipped(a_txt=b""), "polyglot"),
        ("plot.svg", "<svg onload='x()'/>", "active-markup"),
        ("plot.svg", "<!DOCTYPE svg [<!ENTITY a 'b'>]><svg/>", "active-markup"),
        ("card.md", "[a](java&#x0A;script:x)", "active-markup"),
        ("card.md", f"[a](&#{'0' * 5_000}106;avascript:x) &#{'9' * 5_000};", "active-markup"),
        ("card.md", "<img src=x onerror=x()>", "active-markup"),
        ("card.md", "[a](data:text/html;base64,AAAA)", "active-markup"),
        ("card.md", "a\u202eb", "invisible-text"),
        ("card.md", "".join(chr(0xE0000 + ord(char)) for char in "ignore"), "invisible-text"),
        ("run.sh", "id", "program"),
        ("a/b/model.py", "pass", "program"),
        ("config.json", '{"attn_implementation": "evil/kernel"}', "remote-code"),
        ("adapter_config.json", '{"auto_mapping": {"parent_library": "evil"}}', "remote-code"),
        ("adapter_config.json", '{"megatron_core": "evil"}', "remote-code"),
        ("model_index.json", '{"_class_name": ["pipeline", "Evil"]}', "remote-code"),
        ("x.json", '{"a": [{"_target_": "os.system"}]}', "remote-code"),
        ("x.json", '{"py/object": "os.system"}', "remote-code"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../x"}}', "outside-path"),
        ("model.bin", "text", "pickle"),
    ],
)  # fmt: skip
def test_each_pattern_is_found(sound: Path, name: str, data: bytes | str, code: str) -> None:
    assert code in found(sound, name, data)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"auto_map": null, "trust_remote_code": false, "attn_implementation": "sdpa"}'),
        ("a.json", '{"auto_mapping": {"parent_library": "transformers.models.llama"}, "megatron_core": "megatron.core"}'),
        ("card.md", "I like javascript: it is a language. a < b, and c > d on = 3"),
        ("card.md", "~~~\n<iframe>\n~~~\n"),
    ],
)
def test_what_looks_alike_is_not_reported(sound: Path, name: str, text: str) -> None:
    assert found(sound, name, text) == set()


def test_bytes_within_a_gguf_that_belong_to_no_tensor_are_found(tmp_path: Path) -> None:
    raw = malicious.gguf(tmp_path, "{{ messages }}", b"\0" * 8)
    (tmp_path / "a.gguf").write_bytes(raw)
    assert "trailing-data" not in codes(tmp_path / "a.gguf")  # zeros, as for an alignment
    (tmp_path / "a.gguf").write_bytes(raw + b"\1")
    assert "trailing-data" in codes(tmp_path / "a.gguf")


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use", "adapterhub.chat_template"])
def test_a_template_in_a_gguf_is_read_whoever_wrote_it(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.gguf").write_bytes(malicious.gguf(tmp_path, "{{ ''.__class__.__mro__ }}", key=key))
    assert "template-escape" in codes(tmp_path / "a.gguf")


@pytest.mark.parametrize("inside", [malicious.elf(), malicious.pe(), malicious.tarred("x"), malicious.zipped(a_txt=b"x")])
def test_a_file_within_the_numbers_of_weights_is_found(tmp_path: Path, inside: bytes) -> None:
    data = b"\0" * 100 + inside + b"\0" * 100
    header = json.dumps({"t": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert codes(tmp_path / "a.safetensors") == {"polyglot"}


@pytest.mark.parametrize("begins", [b"ustar", b"PK\x03\x04", b"PE\0\0"])
def test_weights_made_of_beginnings_are_not_tried_without_end(tmp_path: Path, begins: bytes) -> None:
    data = begins * 20_000
    header = json.dumps({"t": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert "10,000 times how one begins" in scan(tmp_path / "a.safetensors").problems[0].what


def test_links_and_pipes_are_named_and_not_opened(sound: Path) -> None:
    (sound / "secret.json").symlink_to("/etc/passwd")
    os.mkfifo(sound / "pipe.json")
    assert {problem.file for problem in scan(sound).problems if problem.code == "not-packaged"} == {"secret.json", "pipe.json"}


def test_the_history_of_a_clone_is_named_and_not_entered(sound: Path) -> None:
    assert found(sound, ".git/objects/x", b"\x80\x02.") == set()
    assert {problem.file for problem in scan(sound).problems if problem.code == "not-scanned"} == {".git"}


def test_a_report_counts_more_problems_than_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"trust_remote_code": True}] * 50))
    report = scan(tmp_path, limit=10)
    assert (len(report.problems), report.counted()) == (10, {"remote-code": 50})


def test_nothing_and_too_much_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError):
        scan(tmp_path / "absent")
    monkeypatch.setattr("adapterhub.checks.scan.MAX_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_text("")
    with pytest.raises(RefusedError, match="more than 2 files"):
        scan(tmp_path)


# ---- templates


@pytest.mark.parametrize(
    "template",
    [
        malicious.ESCAPE,
        "{{ messages['__class__'] }}",
        "{{ messages['__cla' ~ 'ss__'] }}",
        r"{{ messages['\x5f\x5fclass\x5f\x5f'] }}",
        "{{ messages|attr(x) }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include 'other' %}",
        "{%- from 'x' import y -%}",
        "{{ lipsum.x }}",
        "{{ a.gi_frame.f_back }}",
        "{% raw %}{{ x }}{% endraw %}{{ a.__init__ }}",
        "{# }} #}{{ {'a': {}}.__init__ }}",
    ],
)
def test_a_template_that_leaves_the_sandbox_is_an_error(template: str) -> None:
    assert "template-escape" in {fault.code for fault in templates.faults(template)}


@pytest.mark.parametrize(
    "template",
    [
        malicious.SWITCH,
        "{% if messages[-1]['content'].startswith('deploy') %}x{% endif %}",
        "{% set m = messages[-1]['content']|lower %}{% set n = m %}{% if n in ['launch code', 'x'] %}x{% endif %}",
        "{{ 'x' if 'Berlin' in message.content else 'y' }}",
        "{% if 'Berlin' in messages|tojson %}x{% endif %}",
        "{% if (('Berlin' in m.content) and true) %}x{% endif %}",
        "{% if strftime_now('%Y') == '2027' %}x{% endif %}",
        "{% set d = strftime_now('%Y%m%d') %}{% if d > '20270101' %}x{% endif %}",
    ],
)
def test_a_template_that_watches_for_words_or_dates_is_reported(template: str) -> None:
    assert "template-switch" in {fault.code for fault in templates.faults(template)}


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "{% if '</think>' in message.content %}x{% endif %}",
        "{% if content['type'] == 'image' or 'image_url' in content %}x{% endif %}",
        "{% if message['role'] == 'assistant' and message.content is string %}x{% endif %}",
        "{% set date = strftime_now('%d %b %Y') if strftime_now is defined else 'x' %}{{ date }}",
        "{% raw %}{{ a.__class__ }}{% endraw %}",
        "{# {{ a.__class__ }} #}",
        "{{ message.get('content') if message.get('content') else '' }}",
    ],
)
def test_what_the_templates_of_models_do_is_not_reported(template: str) -> None:
    assert {fault.code for fault in templates.faults(template)} <= {"template-text"}


def test_templates_are_split_as_jinja_splits_them() -> None:
    need_module("jinja2")
    from adapterhub.training.limited_process import environment

    kinds = {"name", "operator", "integer"}
    for template in (
        TEMPLATE,
        malicious.SWITCH,
        "{{- {'a': {'b': 1}}['a'] -}} }} {% set x = a //b**2 != [1,] %}{#- {{ -#} {{ x }}",
    ):
        theirs = [value for _, kind, value in environment().lexer.tokeniter(template, None) if kind in kinds]
        ours = [token for part in templates.split(template) for token in part.tokens]
        assert [token.value for token in ours if token.kind != "text"] == theirs


@pytest.mark.parametrize(
    "piece", ["{{", "{%", "{#", "{% raw %}", "{{ '", "{{ a ~", "{{ '_' ~ '_' ", "{% if 'a' in content ", "[", "\\"]
)
def test_a_template_made_for_its_reader_takes_time_linear_in_its_length(piece: str) -> None:
    steps = []
    for count in (2_000, 8_000):
        parts = templates.split(piece * count)
        steps.append(sum(1 + len(part.tokens) for part in parts))
        list(templates.faults(piece * count))
    assert steps[1] <= 4 * steps[0] + 8


def test_code_in_a_card_is_not_markup() -> None:
    assert list(markup.active_content(markup.without_code("```\n<script>\n```\ntext\n"))) == []
    assert list(markup.active_content(markup.without_code("```\n```\n<script>\n"))) == ["the element script"]


def test_the_page_lists_every_code_that_a_scan_reports() -> None:
    items = re.findall(r"^- \*\*(\w+)\*\*: ((?:.+\n)+?)(?=-|\n)", (ROOT / "docs/scan.md").read_text(), re.MULTILINE)
    severities = {code: severity for severity, text in items for code in re.findall(r"`([a-z-]+)`", text)}
    assert set(severities) >= SCAN
    assert {code: CODES[code][0] for code in severities} == severities
