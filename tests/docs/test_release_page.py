"""The page on releases: its steps are run in turn, and print what it shows."""

from __future__ import annotations

import re
import shlex
from contextlib import closing
from pathlib import Path

from adapterhub.manifest.rollout_state import RolloutState, RolloutStep
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import rollouts
from adapterhub.serve.usage.answer_log import AnswerRecord, Feedback
from adapterhub.serve.usage.record_place import FILE
from adapterhub.serve.usage.usage_database import UsageDatabase
from tests.conftest import ROOT, Run
from tests.support.adapters import write_adapter

# Sections that need a gateway; `tests/serve/gateway/test_rollouts.py` and others have their steps.
_OF_GATEWAYS = ("Roll out\n", "Feedback\n", "Which version gave an answer\n")
PAGE = "\n## ".join(
    section for section in (ROOT / "docs" / "release.md").read_text().split("\n## ") if not section.startswith(_OF_GATEWAYS)
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
# What differs from run to run.
VARYING = (
    (r"sha256:[0-9a-f…]+ *", "sha256:… "),
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\dZ?", "DATE"),
    (r"DIGEST +BY", "DIGEST BY"),
    (r"WHEN +VERSION +ROUTE", "WHEN VERSION ROUTE"),
)


def steps() -> list[tuple[str, str]]:
    """Commands with what they print."""
    text = "".join(body for kind, body in BLOCK.findall(PAGE) if kind == "console" and body.startswith("$ adapterhub "))
    return [(step.partition("\n")[0], step.partition("\n")[2]) for step in re.split(r"^\$ adapterhub ", text, flags=re.M)[1:]]


def plain(text: str) -> str:
    for pattern, word in VARYING:
        text = re.sub(pattern, word, text)
    return "\n".join(line.rstrip() for line in text.splitlines())


def write_what_a_gateway_records(registry_folder: Path) -> None:
    """A rollout of `team/legal` at its second step, and an answer of its candidate."""
    with Registry.open(registry_folder) as registry:
        stable, candidate = (f"team/legal@{row.digest}" for row in reversed(registry.list("team/legal")))
        steps = (RolloutStep(5, 600), RolloutStep(25, 1800), RolloutStep(50))
        counts = {"errors": (1, 38, 1)}
        state = RolloutState("legal", stable, steps, {"errors": 5.0}, step=1, seconds=720, counts=counts)
        rollouts.change(registry.ledger, Ref.parse(candidate), "legal", lambda _: state)
    path, arm = "/v1/completions", "team/legal:v8"
    answer = AnswerRecord("req-1", "chatcmpl-8f2c", 0.0, "research", candidate, "legal", arm, "vllm", path, 200, 0.5, 21, 12)
    with closing(UsageDatabase(registry_folder / FILE)) as database, database.transaction():
        database.add_answers([answer], [Feedback("req-1", "research", candidate, "legal", arm, 1.0, 0.0, "dates")])


def test_the_steps_of_the_page_print_what_it_shows(tmp_path: Path, run: Run) -> None:
    for seed, name in ((1, "old"), (2, "sql")):
        write_adapter(tmp_path / name, seed)
    author = {"ADAPTERHUB_AUTHOR": "dan"}
    run("init", ".", env=author)
    for name in ("old", "sql"):
        run("push", f"./{name}", "team/sql", "--force", env=author)
        run("push", f"./{name}", "team/legal", "--force", env=author)
    write_what_a_gateway_records(tmp_path)
    run("tag", "team/sql:v1", "prod", env={"ADAPTERHUB_AUTHOR": "ana"})
    (tmp_path / "keys").mkdir()
    for name in ("bo", "cy"):
        run("key", "generate", f"keys/{name}")
    (tmp_path / "adapterhub.toml").write_text(next(body for kind, body in BLOCK.findall(PAGE) if kind == "toml"))
    for command, printed in steps():
        command_author = next((name for name in ("bo", "cy") if f"keys/{name}.key" in command), "ana")
        result = run(*shlex.split(command), env={"ADAPTERHUB_AUTHOR": command_author}, code=None)
        assert plain(result.stdout + result.stderr) == plain(printed), command
