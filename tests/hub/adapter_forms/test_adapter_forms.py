"""Who may write to an adapter changes it on its pages, without JavaScript, and with the checks of a push."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import pytest
from starlette.routing import Route

from adapterhub.hub import gates
from adapterhub.hub.accounts import audit_log
from adapterhub.hub.adapter_forms import routes
from adapterhub.hub.adapter_forms.multipart import MultipartReader, boundary_of
from adapterhub.hub.gates import Gate
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import Ref
from adapterhub_converters.errors import FormatError
from tests.hub.conftest import Running
from tests.hub.web.conftest import Answer, Visitor, hide, person
from tests.hub.web.test_pages import Push
from tests.support.adapters import write_adapter

HERE = "/-/adapters/team/sql"
PATH = "/-/adapters/{namespace}/{repo}"
OF_READERS = {f"{PATH}/star", f"{PATH}/ask-access"}
PROPOSALS = {f"{PATH}/propose", f"{PATH}/propose-edit/{{path:path}}"}  # of readers, too, and about files
FORMS = sorted({route.path for route in routes.routes() if isinstance(route, Route)} - OF_READERS - PROPOSALS)
CARD = f"{HERE}/edit/README.md"


@pytest.fixture
def ada(visitor: Visitor, database: HubDatabase) -> Visitor:
    """Somebody who may write in `team`."""
    return person(visitor, database, "ada", team="write")


def send(visitor: Visitor, action: str, name: str = "team/sql", **fields: str) -> Answer:
    return visitor.post(f"/-/adapters/{name}/{action}", {"csrf": visitor.csrf(), **fields})


def upload(visitor: Visitor, csrf: str, files: dict[str, bytes], name: str = "team/sql", *, action: str = "upload") -> Answer:
    """Send a form with files, as a browser does."""
    parts = [f'--B\r\nContent-Disposition: form-data; name="csrf"\r\n\r\n{csrf}\r\n'.encode()]
    for path, data in files.items():
        head = f'--B\r\nContent-Disposition: form-data; name="file"; filename="{path}"\r\nContent-Type: application/x\r\n\r\n'
        parts += [head.encode(), data, b"\r\n"]
    headers = {"Content-Type": "multipart/form-data; boundary=B", "Origin": visitor.hub.url}
    return visitor._ask("POST", f"/-/adapters/{name}/{action}", b"".join([*parts, b"--B--\r\n"]), headers)


def log(hub: Running, name: str = "team/sql") -> list[str]:
    with hub.registry() as registry:
        return [entry.op for entry in registry.log(Ref(name))]


# ---- who may


@pytest.mark.parametrize("path", FORMS)
def test_only_who_may_write_changes_anything(
    hub: Running, visitor: Visitor, database: HubDatabase, push: Push, path: str
) -> None:
    push("team/sql")
    hide(hub, "team/sql")
    url = path.replace("{namespace}", "team").replace("{repo}", "sql").replace("{path:path}", "README.md")
    reader, stranger = person(visitor, database, "rob", team="read"), person(visitor, database, "eve")
    fields = {
        "tag": "x",
        "reference": "v1",
        "visibility": "public",
        "to": "team/other",
        "confirm": "team/sql",
        "parent": "0" * 40,
        "message": "because",
    }
    multipart = {"Content-Type": "multipart/form-data; boundary=B"}
    assert reader.post(url, {"csrf": reader.csrf(), **fields}).status == 403
    assert stranger.post(url, {"csrf": stranger.csrf(), **fields}).status in (403, 404)
    assert visitor.post(url, fields).headers["location"] == "/-/sign-in"
    writer = person(visitor, database, "ada", team="write")
    assert writer.post(url, {**fields, "csrf": "0" * 64}).status in (400, 403)
    assert writer.post(url, {**fields, "csrf": writer.csrf()}, Origin="https://evil.example", **multipart).status == 403
    assert log(hub) == ["push"]


@pytest.mark.parametrize("path", sorted(OF_READERS))
def test_what_readers_may_do_needs_a_session_its_token_and_a_name_that_they_see(
    hub: Running, visitor: Visitor, database: HubDatabase, push: Push, path: str
) -> None:
    push("team/sql")
    hide(hub, "team/sql")
    gates.set_gate(database, "team/sql", Gate(gates.MANUAL))
    url = path.replace("{namespace}", "team").replace("{repo}", "sql")
    reader, stranger = person(visitor, database, "rob", team="read"), person(visitor, database, "eve")
    assert visitor.post(url, {}).headers["location"] == "/-/sign-in"
    assert stranger.post(url, {"csrf": stranger.csrf()}).status == 404
    assert reader.post(url, {"csrf": "0" * 64}).status in (400, 403)
    assert reader.post(url, {"csrf": reader.csrf()}, Origin="https://evil.example").status == 403
    assert reader.post(url, {"csrf": reader.csrf()}).status == 303


def test_settings_are_shown_to_who_may_write(
    hub: Running, visitor: Visitor, ada: Visitor, database: HubDatabase, push: Push
) -> None:
    push("team/sql")
    assert HERE in ada.get("/team/sql").html.values("a", "href")
    assert HERE not in visitor.get("/team/sql").html.values("a", "href")
    assert ada.get(HERE).status == 200
    assert visitor.get(HERE).headers["location"].startswith("/-/sign-in")
    reader = person(visitor, database, "rob", team="read")
    assert reader.get(HERE).status == 403
    hide(hub, "team/sql")
    assert person(visitor, database, "eve").get(HERE).status == 404


# ---- names and tags


def test_tags_are_made_moved_and_removed_where_the_page_showed_them(hub: Running, ada: Visitor, push: Push) -> None:
    first, second = push("team/sql", 1), push("team/sql", 2)
    assert send(ada, "tag", tag="prod", reference="v1", at="absent").headers["location"] == f"{HERE}#tags"
    assert send(ada, "tag", tag="prod", reference="v2", at="absent").status == 400
    assert send(ada, "tag", tag="prod", reference="v2", at=second).status == 400
    assert send(ada, "tag", tag="prod", reference="v2", at=first).status == 303
    assert "prod" in ada.get(HERE).text
    for tag in ("main", "latest", "v3", "a b", ""):
        assert send(ada, "tag", tag=tag, reference="v1").status == 400, tag
    assert send(ada, "remove-tag", tag="prod", at=second).status == 303
    assert log(hub) == ["untag", "tag", "tag", "push", "push"]


def test_versions_and_names_are_deprecated_and_no_longer(hub: Running, ada: Visitor, push: Push) -> None:
    push("team/sql")
    assert send(ada, "deprecate", reference="v1", message="overfits").status == 303
    assert send(ada, "deprecate", message="use team/new").status == 303
    assert "v1 is deprecated: overfits" in ada.get(HERE).text
    assert "All versions are deprecated: use team/new" in ada.get(HERE).text
    assert send(ada, "deprecate", reference="v1", undo="true").status == 303
    assert "overfits" not in ada.get(HERE).text


def test_a_name_is_hidden_renamed_removed_and_restored(ada: Visitor, visitor: Visitor, push: Push) -> None:
    push("team/sql")
    assert send(ada, "visibility", visibility="private").status == 303
    assert visitor.get("/team/sql").status == 404
    assert send(ada, "visibility", visibility="shown").status == 400
    assert send(ada, "rename", to="Team/new").headers["location"] == "/-/adapters/team/new"
    assert ada.get("/team/sql").headers["location"] == "/team/new"
    assert send(ada, "rename", "team/new", to="team/new").status == 400
    assert send(ada, "rename", "team/new", to="other/new").status == 403
    assert send(ada, "rename", "team/new", to="/").status == 400
    assert send(ada, "remove", "team/new", confirm="team/old").status == 400
    assert send(ada, "remove", "team/new", confirm="team/new").headers["location"] == "/-/adapters/team/new"
    assert ada.get("/team/new").status == 404
    assert "was removed" in ada.get("/-/adapters/team/new").text
    assert visitor.get("/-/adapters/team/new").status == 404
    assert send(ada, "restore", "team/new").status == 303
    assert ada.get("/team/new").status == 200
    assert visitor.get("/team/new").status == 404


def test_retention_is_set_by_an_admin_of_the_namespace(
    ada: Visitor, visitor: Visitor, database: HubDatabase, push: Push
) -> None:
    push("team/sql")
    assert send(ada, "retention", keep="3").status == 403
    boss = person(visitor, database, "boss", team="admin")
    assert send(boss, "retention", keep="3").status == 303
    assert "the 3 newest and tagged versions" in boss.get(HERE).text
    assert send(boss, "retention", keep="", days="90").status == 303
    assert "the newest, those of the last 90 days, and tagged versions" in boss.get(HERE).text
    assert send(boss, "retention", keep="").status == 303
    assert "all versions" in boss.get(HERE).text
    assert [send(boss, "retention", keep=text).status for text in ("-1", "x", "9" * 30)] == [400] * 3
    assert [(row.action, row.detail) for row in audit_log.events(database) if row.action == "forms.keep"][-1] == (
        "forms.keep",
        "keep=3",
    )


# ---- files


def parent_in(page: Answer) -> str:
    return next(str(attrs["value"]) for tag, attrs in page.html.elements if tag == "input" and attrs.get("name") == "parent")


def test_the_card_is_edited_in_a_commit_on_what_was_read(hub: Running, ada: Visitor, push: Push) -> None:
    push("team/sql", files={"README.md": "# Old\n\nkept\n"})
    page = ada.get(CARD)
    assert "# Old" in page.text
    parent = parent_in(page)
    saved = send(ada, "edit/README.md", parent=parent, text="# New\r\n\r\nkept\r\n", title="Say more")
    commit = ada.get(saved.headers["location"])
    assert "Say more" in commit.text
    assert "-# Old" in commit.text
    assert "+# New" in commit.text
    assert log(hub) == ["push", "push"]
    for action in ("edit", "propose-edit"):
        late = send(ada, f"{action}/README.md", parent=parent, text="# Mine", title="x")
        shown_texts = [text in late.text for text in ("has committed meanwhile", "# Mine", "# New")]
        assert (late.status, shown_texts) == (409, [True] * 3), action
    assert parent_in(late) == parent_in(ada.get(CARD))
    assert "+# Mine" in ada.get(send(ada, "edit/README.md", parent=parent_in(late), text="# Mine").headers["location"]).text
    listed = ada.get("/team/sql/commits")
    assert "Say more" in listed.text
    assert "v3" in listed.text


@pytest.mark.parametrize("action", ["edit", "propose-edit"])
def test_a_refused_edit_is_shown_again_with_its_text(hub: Running, ada: Visitor, push: Push, action: str) -> None:
    push("team/sql", files={"README.md": "# Old\n"})
    parent = parent_in(ada.get(CARD))
    for fields, words in (
        ({"text": "# Mine"}, "Load the page again"),
        ({"parent": parent, "text": "# Mine" + "x" * (300 << 10)}, "has more than 256 KiB"),
        ({"parent": parent, "text": "# Old\r\n<!-- # Mine", "title": "y" * 300}, ""),
    ):
        answer = send(ada, f"{action}/README.md", **fields)
        if words:
            assert (answer.status, words in answer.text, "# Mine" in answer.text, parent_in(answer) == parent) == (
                400,
                *[True] * 3,
            )
        else:
            assert answer.status == 303
    unknown = send(ada, f"{action}/README.md", parent="0" * 40, text="# Mine")
    assert (unknown.status, "# Mine" in unknown.text) == (409, True)
    assert send(ada, f"{action}/README.md", parent=parent_in(unknown), text="# Old\n" if action != "edit" else "x").status < 500


def test_a_reader_proposes_an_edit_of_the_card_or_another_text(
    hub: Running, ada: Visitor, visitor: Visitor, database: HubDatabase, push: Push
) -> None:
    push("team/sql", files={"README.md": "# Old\n", "notes.json": '{"a": 1}\r\n'})
    reader = person(visitor, database, "rob")
    assert CARD in visitor.get("/team/sql").html.values("a", "href")
    assert visitor.get(CARD).headers["location"] == f"/-/sign-in?next={quote(CARD, safe='')}"
    page = reader.get(CARD)
    assert f"{HERE}/propose-edit/README.md" in page.html.values("form", "action")
    assert "Commit to main" not in page.text
    assert send(reader, "edit/README.md", parent=parent_in(page), text="# Mine").status == 403
    proposal = reader.get(send(reader, "propose-edit/README.md", parent=parent_in(page), text="# New").headers["location"])
    assert [text in proposal.text for text in ("Update README.md", "by rob", "-# Old", "+# New")] == [True] * 4
    assert log(hub) == ["push"]
    assert send(ada, "accept-proposal", proposal="1").status == 303
    assert "# New" in ada.get(CARD).text

    notes = f"{HERE}/edit/notes.json"
    assert notes in reader.get("/team/sql/blob/main/notes.json").html.values("a", "href")
    sent = send(reader, "propose-edit/notes.json", parent=parent_in(reader.get(notes)), text='{"a": 2}\r\n')
    assert sent.headers["location"] == "/team/sql/discussions/2"
    data = reader._ask("GET", "/team/sql/resolve/refs%2Fpr%2F2/notes.json", b"", {}).body
    assert data == b'{"a": 2}\r\n'  # with the ends of lines that it had
    by_a_writer = send(ada, "propose-edit/notes.json", parent=parent_in(ada.get(notes)), text="[]")
    assert by_a_writer.headers["location"] == "/team/sql/discussions/3"


def test_only_texts_that_are_there_are_edited(
    hub: Running, ada: Visitor, visitor: Visitor, database: HubDatabase, push: Push
) -> None:
    push("team/sql", files={"README.md": "# Old\n", "notes.json": '"\u00e9"'})
    parent, reader = parent_in(ada.get(CARD)), person(visitor, database, "rob")
    for path in ("missing.json", "adapter_model.safetensors", "../README.md", "README.md/x"):
        for client, action in ((ada, "edit"), (reader, "propose-edit")):
            assert client.get(f"{HERE}/edit/{quote(path)}").status in (303, 404), path
            answer = send(client, f"{action}/{quote(path)}", parent=parent, text="# Mine")
            assert answer.status in (303, 400, 404), path
            assert not answer.headers.get("location", "").startswith("/team/sql"), path
    assert send(ada, "edit/README.md", "team/sql.v1", parent=parent, text="# Mine").status in (400, 404)
    gates.set_gate(database, "team/sql", Gate(gates.MANUAL))
    assert reader.get(CARD).status == 403
    assert send(reader, "propose-edit/README.md", parent=parent, text="# Mine").status == 403
    hide(hub, "team/sql")
    assert reader.get(CARD).status == 404
    assert send(reader, "propose-edit/README.md", parent=parent, text="# Mine").status == 404
    assert log(hub) == ["push"]


def test_uploaded_files_become_a_version_with_the_checks_of_a_push(hub: Running, ada: Visitor, tmp_path: Path) -> None:
    with hub.registry() as registry:
        registry.push(write_adapter(tmp_path / "first", 1), Ref("team/sql"))
    folder = write_adapter(tmp_path / "second", 2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    uploaded = upload(ada, ada.csrf(), files)
    assert (uploaded.status, "team/sql:v2" in uploaded.text) == (200, True), uploaded.text
    with hub.registry() as registry:
        assert registry.row(Ref("team/sql")).number == 2
    pickled = pickle.dumps([os.system])
    assert upload(ada, ada.csrf(), {"notes.json": pickled}).status == 400
    assert "Left out, as no files of an adapter: evil.bin" in upload(ada, ada.csrf(), {"evil.bin": pickled}).text
    for path in ("../x", "a/../../x", "/etc/passwd"):
        assert upload(ada, ada.csrf(), {path: b"x"}).status == 400, path
    assert upload(ada, "0" * 64, files).status == 403
    assert upload(ada, ada.csrf(), {}).status == 400
    assert log(hub) == ["push", "push"]


def test_a_form_has_few_fields_besides_its_files_and_perhaps_a_file_that_was_not_chosen(ada: Visitor, push: Push) -> None:
    push("team/sql")
    empty = "".join(f'--B\r\nContent-Disposition: form-data; name="f{number}"\r\n\r\n\r\n' for number in range(100))
    csrf = f'--B\r\nContent-Disposition: form-data; name="csrf"\r\n\r\n{ada.csrf()}\r\n'
    unchosen = '--B\r\nContent-Disposition: form-data; name="file"; filename=""\r\n\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=B", "Origin": ada.hub.url}
    for body, words in ((empty, "has more than 20 fields besides its files"), (csrf + unchosen, "Choose the files")):
        answer = ada._ask("POST", f"{HERE}/upload", f"{body}--B--\r\n", headers)
        assert (answer.status, words in answer.text) == (400, True), answer.text


def test_a_repository_without_a_version_takes_files(hub: Running, ada: Visitor, tmp_path: Path) -> None:
    from tests.support.hub_tenants import Tenant

    Tenant(hub, "team").create("new")
    partial = upload(ada, ada.csrf(), {"README.md": b"# Soon"}, name="team/new")
    assert "not a whole adapter yet" in partial.text
    assert "# Soon" in ada.get("/-/adapters/team/new/edit/README.md").text


def test_a_reader_proposes_files_with_the_checks_of_a_push(
    hub: Running, visitor: Visitor, ada: Visitor, database: HubDatabase, tmp_path: Path
) -> None:
    with hub.registry() as registry:
        registry.push(write_adapter(tmp_path / "first", 1), Ref("team/sql"))
    reader = person(visitor, database, "rob")
    files = {path.name: path.read_bytes() for path in write_adapter(tmp_path / "second", 2).iterdir()}
    assert upload(reader, reader.csrf(), files).status == 403  # nothing but a proposal
    sent = upload(reader, reader.csrf(), {**files, "x.bin": b"x", "model.sig": b"{}"}, action="propose")
    assert (sent.status, "Left out, as no files of an adapter: model.sig, x.bin" in sent.text) == (200, True), sent.text
    assert "/team/sql/discussions/1" in sent.html.values("a", "href")
    assert "Upload README.md, adapter_config.json" in reader.get("/team/sql/discussions/1").text
    pickled = pickle.dumps([os.system])
    for refused in ({"notes.json": pickled}, {"../x": b"x"}, {}):
        assert upload(reader, reader.csrf(), refused, action="propose").status == 400
    accepted = ada.post(f"{HERE}/accept-proposal", {"csrf": ada.csrf(), "proposal": "1"})
    assert (accepted.status, log(hub)) == (303, ["push", "push"])
    by_a_writer = upload(ada, ada.csrf(), {"README.md": b"# Mine"}, action="propose")
    assert (by_a_writer.status, log(hub)) == (200, ["push", "push"])


def test_who_may_not_read_the_files_of_a_name_proposes_none(
    hub: Running, visitor: Visitor, database: HubDatabase, push: Push
) -> None:
    push("team/sql")
    reader, files = person(visitor, database, "rob"), {"README.md": b"# Better"}

    def statuses() -> list[int]:
        sent = [upload(sender, csrf, files, action="propose") for sender, csrf in ((reader, reader.csrf()), (visitor, ""))]
        return [answer.status for answer in sent]

    gates.set_gate(database, "team/sql", Gate(gates.MANUAL))
    assert statuses() == [403, 303]
    assert 'action="/-/adapters/team/sql/propose"' not in reader.get("/team/sql/discussions").text
    gates.set_gate(database, "team/sql", None)
    assert upload(reader, "0" * 64, files, action="propose").status == 403
    assert upload(reader, reader.csrf(), files, "team/sql.v1", action="propose").status == 400
    hide(hub, "team/sql")
    assert statuses() == [404, 303]
    assert database.select("SELECT * FROM proposals") == []


# ---- forms with files


async def _pieces(raw: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(raw), size):
        yield raw[at : at + size]


async def _parts(raw: bytes, size: int) -> list[tuple[str, str | None, bytes]]:
    reader, parts = MultipartReader(_pieces(raw, size), b"B"), []
    while part := await reader.next_part():
        data = b"".join([piece async for piece in reader.data()])
        parts.append((part.name, part.filename, data))
    return parts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_form_is_the_same_however_it_arrives(size: int) -> None:
    raw = (
        b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n--B\r\nContent-Disposition: form-data; name="f";'
        b' filename="x y.bin"\r\nContent-Type: b\r\n\r\n\r\n--b--\r\n--\r\n--B\r\ncontent-disposition: form-data; name="e";'
        b' filename=""\r\n\r\n\r\n--B--\r\n'
    )
    expected = [("a", None, b""), ("f", "x y.bin", b"\r\n--b--\r\n--"), ("e", "", b"")]
    assert asyncio.run(_parts(raw, size)) == expected


@pytest.mark.parametrize(
    "raw", [b"", b"--", b"x--B--", b"--B\r\n", b"--B\r\na: b\r\n\r\ndata", b"--Bx\r\n", b"--B\r\n" + b"a" * 100_000]
)
def test_a_form_that_is_none_is_a_format_error(raw: bytes) -> None:
    with pytest.raises(FormatError):
        asyncio.run(_parts(raw, 1000))


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 71],
)
def test_a_body_without_a_boundary_is_a_format_error(kind: str) -> None:
    with pytest.raises(FormatError):
        boundary_of(kind)
