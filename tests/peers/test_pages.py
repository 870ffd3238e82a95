"""The hub's pages in a real browser: axe finds nothing wrong with any, dark or light, wide or narrow; none runs a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.hub import gates
from adapterhub.hub.gates import Gate
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.operations.workspace import Workspace
from adapterhub.project import settings_file
from adapterhub.ref import Ref
from tests.hub.conftest import Running, serving
from tests.hub.sending import Sending, lines_of
from tests.support.adapters import write_adapter
from tests.support.browser import Browser

pytestmark = pytest.mark.peer

PATHS = [
    *("/", "/?q=nothing-has-this", "/?rank=many", "/?license=MIT", "/-/bases", "/-/bases?name=org/base", "/team", "/-/sign-in"),
    *("/team/sql", "/team/sql/v1", "/team/sql/versions", "/team/sql/compare", "/team/sql/v2/tensors", "/team/sql/v2/norms"),
    *("/team/both/v1/lineage", "/team/none", "/-/admin", "/device", "/-/account", "/-/namespaces/team"),
    *("/-/adapters/team/sql", "/-/adapters/team/sql/edit/README.md", "/team/sql/commits", "/team/sql/commit/v2"),
    *("/team/sql/channels", "/team/sql/discussions", "/team/sql/discussions/1", "/team/sql/blob/main/README.md", "/team/gated"),
]
CARD = "# A card\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n```python\nprint(1)\n```\n\n> quoted\n\n![loss](loss.png)\n"
TOML = "description = 'Writes SQL.'\nlicense = 'MIT'\n[training]\nseed = 7\n[training.metrics]\neval_loss = 0.5\n" + "".join(
    f"[[training.curve]]\nstep = {step}\nloss = {2 / (step + 1)}\nheldout_loss = {3 / (step + 1)}\n" for step in range(9)
)
# Signs in, opens every page on a screen of that width, and says of each what is wrong with it.
_TOUR = """
found = {}
page.goto(URL + "/-/sign-in")
page.fill("#token", TOKEN)
page.keyboard.press("Enter")
page.wait_for_url(URL + "/")
cookies = page.context.cookies()
context = page.context.browser.new_context(color_scheme=SCHEME, viewport={"width": WIDTH, "height": 844})
context.add_cookies(cookies)
one = context.new_page()
said, asked = [], []
one.on("console", lambda message: said.append(message.text))
one.on("pageerror", lambda error: said.append(str(error)))
one.on("request", lambda request: asked.append(request.url))
for path in PATHS:
    answer = one.goto(URL + path)
    wrong = [f"{rule['id']}: {node['html']}" for rule in axe.run(one).response["violations"] for node in rule["nodes"]]
    wrong += [text for text in said if not (answer.status >= 400 and "Failed to load resource" in text)]
    wrong += [f"asked for {url}" for url in asked if not url.startswith(URL + "/")]
    if one.evaluate("document.documentElement.scrollWidth > innerWidth"):
        wrong.append("wider than the screen")
    if wrong:
        found[path] = wrong
    said.clear()
    asked.clear()
context.close()
result = found
"""
# Goes through a page by the Tab key; what has the focus without showing it.
_TABS = """
page.goto(URL + "/team/sql")
names, hidden = [], []
for _ in range(60):
    page.keyboard.press("Tab")
    focus = page.evaluate('''() => {
        const one = document.activeElement, style = getComputedStyle(one), box = one.getBoundingClientRect();
        return [one.tagName + " " + one.textContent.trim().slice(0, 20), style.outlineStyle, box.width > 0 && box.height > 0];
    }''')
    names.append(focus[0])
    if focus[0].startswith("BODY"):
        break
    if focus[1] == "none" or not focus[2]:
        hidden.append(focus)
page.goto(URL + "/team/sql")
page.keyboard.press("Tab")
page.keyboard.press("Enter")
result = {"names": names, "hidden": hidden, "skipped": page.evaluate("document.activeElement.id")}
"""
# Selects a command by one click.
_COPIES = """
page.goto(URL + "/team/sql")
page.click("pre[aria-label=Download] code")
result = page.evaluate("getSelection().toString()")
"""
_RUNS = """
page.goto(URL + "/team/evil")
page.wait_for_load_state("networkidle")
result = {"title": page.title(), "ran": page.evaluate("window.ran === undefined"), "pictures": page.evaluate(
    "[...document.images].map(one => one.naturalWidth > 0 || one.loading === 'lazy')")}
"""


# Where the lines of verdicts of some adapters end on a phone, from the top of the page.
_STRIPS = """
context = page.context.browser.new_context(viewport={"width": 390, "height": 844})
one, result = context.new_page(), {}
for path in ("/team/sql", "/team/sql/v1", "/team/gated", "/team/both"):
    one.goto(URL + path)
    box = one.locator("[aria-label=Verdicts]").bounding_box()
    result[path] = box["y"] + box["height"]
context.close()
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A hub with some of everything."""
    root = tmp_path_factory.mktemp("pages")
    policy = settings_file.parse("[promote.prod.require]\napprovals = 1\n", root / "adapterhub.toml").policy
    with serving(root / "hub", policy=policy) as running:
        with running.registry() as registry:
            for seed in (1, 2):
                folder = write_adapter(root / f"sql{seed}", seed)
                (folder / "README.md").write_text(CARD)
                (folder / "adapter.toml").write_text(TOML)
                registry.push(folder, Ref("team/sql", tag=f"{seed}.0.0"))
            registry.deprecate(Ref("team/sql", number=1), "too old")
            for number, tag in ((1, "staging"), (2, "staging"), (1, "nightly")):
                registry.tag(Ref("team/sql", number=number), tag)
            registry.push(write_adapter(root / "tone", 3), Ref("team/tone"))
            registry.push(write_adapter(root / "gated", 5), Ref("team/gated"))
            evil = write_adapter(root / "evil", 4)
            (evil / "README.md").write_text(
                "<script>window.ran = 1</script>\n\n![x](x onerror=window.ran=1) [y](javascript:window.ran=1)"
            )
            registry.push(evil, Ref("team/evil"))
        with closing(HubDatabase(running.folder)) as database:
            gates.set_gate(database, "team/gated", Gate(gates.MANUAL, "Cite us."))
        proposed = lines_of({"README.md": b"# Better\n"})
        sender = Sending(running.url, running.make_token("eve", "read"))
        assert sender.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", proposed).status == 200
        ah.merge(["team/sql", "team/tone"], "team/both", weights=[0.7, 0.5], workspace=Workspace(registry=running.folder))
        yield running


def visit(chromium: Browser, hub: Running, body: str, scheme: str = "light", width: int = 1280) -> Any:
    token = hub.make_token("root", "admin")
    names = f"URL, TOKEN, PATHS, SCHEME, WIDTH = {hub.url!r}, {token!r}, {json.dumps(PATHS)}, {scheme!r}, {width}\n"
    return chromium.visit(hub.url, names + body)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_quiet_and_fits(chromium: Browser, hub: Running, scheme: str, width: int) -> None:
    violations = visit(chromium, hub, _TOUR, scheme, width)
    assert violations == {}, json.dumps(violations, indent=1)


def test_the_verdicts_are_in_the_first_screen_of_a_phone(chromium: Browser, hub: Running) -> None:
    ends = visit(chromium, hub, _STRIPS)
    assert len(ends) == 4
    assert max(ends.values()) < 844


def test_the_keyboard_reaches_everything_and_shows_where_it_is(chromium: Browser, hub: Running) -> None:
    keyboard = visit(chromium, hub, _TABS)
    assert keyboard["hidden"] == []
    assert keyboard["names"][0] == "A Skip to the content"
    assert any(name.startswith("SUMMARY vLLM") for name in keyboard["names"])
    assert keyboard["skipped"] == "content"


def test_a_click_selects_a_whole_command_without_a_script(chromium: Browser, hub: Running) -> None:
    command = visit(chromium, hub, _COPIES)
    assert command == f"HF_ENDPOINT={hub.url} hf download team/sql --revision v2 --local-dir sql"


def test_the_card_of_a_stranger_runs_nothing(chromium: Browser, hub: Running) -> None:
    card_page = visit(chromium, hub, _RUNS)
    assert card_page["title"].startswith("team/evil:v1")
    assert card_page["ran"] is True
    assert all(card_page["pictures"])
