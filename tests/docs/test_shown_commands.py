"""Every command that the README, the how-to pages and the reference show is run, or is listed here with the reason why not.

One small world has what the pages name: a base, adapters, a registry, keys, a registry of OCI and a Hub on this machine. Each
command runs in a copy of it, so that none depends on the one before. The steps of tutorials are run in turn: test_tutorials.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from adapterhub.serve.usage.usage_database import UsageDatabase
from tests.conftest import CHECKING, LEARNING, ROOT, _environment
from tests.docs.test_site import PAGES, reference, shown_lines
from tests.support import hub_models, serving
from tests.support.forked import Forked
from tests.support.hub_server import Hub

if sys.platform != "linux":
    pytest.skip("needs fork", allow_module_level=True)

# What is not run here: a pattern of command lines, why, and the test that runs such a command.
ELSEWHERE = {
    r"hub start|--registry \S+ hub start": ("serves until it is stopped", "tests/peers/test_tutorials.py"),
    r"serve ": ("serves until it is stopped", "tests/cli/test_serve.py"),
    r"chat ": ("a conversation", "tests/cli/test_chat.py"),
    r"train \S+\.toml": ("trains for minutes", "tests/cli/test_train_command.py"),
    r"login |logout ": ("asks for a password, or for a browser", "tests/remotes/test_named_remotes.py"),
    r"hub approve": ("answers a login that waits", "tests/hub/accounts/test_devices.py"),
    r"(--registry \S+ )?hub (migrate|recover)|hub gc": ("needs PostgreSQL and a bucket", "tests/peers/hub/test_migration.py"),
    r"hub doctor --certificate": ("needs a certificate", "tests/hub/test_operations.py"),
    r".*(--keyless|--identity)": ("asks Sigstore who you are", "tests/peers/test_keyless.py"),
    r"convert .*--imatrix": ("needs a file of llama-imatrix", "tests/merging/into_base/test_mixtures.py"),
    r".*pkcs11:": ("needs a key in hardware", "tests/peers/test_hardware_keys.py"),
    r"key generate \S+ .*--passphrase": ("asks for a passphrase", "tests/trust/test_signed_versions.py"),
    r".* demo/": ("the session of `make demo`", "examples/demo.py"),
    r"push .*--remote$|push .*--remote team$|remote test|.* --remote( |$)": (
        "asks a remote that a user has configured", "tests/remotes/test_named_remotes.py",
    ),
    r"lock --update '": ("a form, not a command", "tests/cli/test_commands.py"),
    r"eval .*--import": ("needs results about the digest of here", "tests/operations/test_import_results.py"),
    r"eval .*--url": ("asks an endpoint", "tests/operations/test_golden_tests.py"),
    r"(?!promote team/sql:v2 prod --dry-run$|rollback team/sql:prod$|withdraw team/sql:v1 )"
    r"((promote|approve|rollback|withdraw) |gc --withdrawn)": ("steps of one page, in turn", "tests/docs/test_release_page.py"),
    r"rollout ": ("needs a rollout of a gateway", "tests/cli/test_rollout.py"),
    r"served ": ("needs the answer of a gateway", "tests/cli/test_served.py"),
    r"rebuild .*--data": ("needs what adapterhub trained", "tests/cli/test_train_command.py"),
    r"attest .*--training": ("needs what adapterhub trained", "tests/trust/test_attestation.py"),
}  # fmt: skip
# Exit codes other than 0.
CODES = {r"show team/nosuch": 3, r"diff .*--exit-code": 1, r"eval .*--gate '?(ppl|pass>=against)": 1}
_PUBLISHER = "hub publisher add team --issuer https://ci.example --claim sub=x"
_RECIPE = "merge team/sql:v2 --into ./Qwen3-0.6B --recipe-only"
# What a command needs first, beyond the world.
BEFORE = {
    r"pull .*--locked|lock --": ["lock team/sql:prod"],
    r"pull .*--from adapters\.tar|.*layout://adapters\.tar": ["bundle team/sql:v2 team/chat:prod -o adapters.tar"],
    r".*layout://sql\.tar(?!:v2$)|(pull|copy) layout://sql\.tar": ["push ./sql layout://sql.tar:v2"],
    r"rebuild .* --adapter ": ["merge ./sql --into ./Qwen3-0.6B --recipe-only -o qwen3-sql.json"],
    r"rebuild qwen3-sql\.json(?!.* --adapter)": [f"{_RECIPE} -o qwen3-sql.json"],
    r"rebuild qwen3-sql ": [f"{_RECIPE} -o qwen3-sql"],
    r"verify-merge .*qwen3-sql": ["merge team/sql:v2 --into ./Qwen3-0.6B -o ./qwen3-sql"],
    r"verify-merge .*merged\.gguf": ["merge ./a ./b --weights 0.7,0.3 --into ./base -o ./merged.gguf"],
    r"extract .*qwen3-finetuned": ["merge ./sql --into ./Qwen3-0.6B -o ./qwen3-finetuned"],
    r"extract .*\./tuned": ["merge ./sql --into ./base -o ./tuned"],
    r"rebuild team/sql-gguf": ["push team/sql:v2 team/sql-gguf --to gguf --base ./Qwen3-0.6B"],
    r"verify .*--key team\.pub|pull .*--require-signature": ["sign team/sql:v2 --key team.key"],
    r"verify .*--attestations.*ci\.pub": ["attest team/sql:v2 --fits ./Qwen3-0.6B --key ci.key"],
    r"verify .*--attestations.*team\.pub": ["attest team/sql:v2 --fits ./Qwen3-0.6B --key team.key"],
    r"attest team/both:v1 --merge": ["sign team/sql:v2 --key team.key", "sign team/french:v1 --key team.key"],
    r"audit verify .*--checkpoint": ["audit checkpoint -o 2026-11-26.json --key audit.key"],
    r"diff \./sql \./sql\.gguf": ["convert ./french sql.gguf --base ./Qwen3-0.6B"],
    r"attach .*--list": ["attach oci://HOST/team/sql:v2 scan.json --type application/vnd.example.scan+json"],
    r"pull \S+images/": ["push team/sql:v2 oci://HOST/images/sql:v2 --to image"],
    r"(pull|list) hf://": ["push ./sql hf://org/sql"],
    r"copy hf://": ["push ./sql hf://somebody/sql"],
    r"scan hf://": ["push ./sql hf://org/adapter"],
    r"(pull|list) '?s3://": ["push ./sql s3://bucket/adapters/team/sql:v1.2.0"],
    r"remote (default|list|rm)": ["remote add team oci://HOST/adapters --default"],
    r"rollback ": ["tag team/sql:v1 prod"],
    r"restore |rm team/sql -y": ["rm team/both -y", "rm team/merged -y"],
    r"restore ": ["rm team/sql -y"],
    r"verify \./sql": ["describe ./sql"],
    r"fsck .*backup/": ["--registry backup/adapters init"],
    r"deprecate .*--undo": ["deprecate team/sql x"],
    r"pack --undo": ["pack"],
    r"tag .*--restore": ["tag team/sql:v1 prod"],
    r"base (rm|show) qwen3|validate \S+ --base qwen3": ["base add qwen3 ./Qwen3-0.6B"],
    r"hub (member|user (rm|link)|log|webhook|namespace|publisher|backup|load-backup)": [
        "hub namespace set team", "hub user add ada",
    ],
    r"hub member rm": ["hub member set team ada --role write"],
    r"hub admission rm": ["hub admission add --issuer https://login.example --claim email=@example.org"],
    r"hub publisher (rm|add .*--as)": ["hub user add trainer", _PUBLISHER],
    r"hub webhook rm": ["hub webhook add team https://ci.example/hook"],
    r"hub token revoke": ["hub token create a --role read", "hub token create b --role read", "hub token create c --role read"],
    r"hub load-backup": ["hub backup hub-2026-11-26.tar"],
    r"fsck --rebuild-index --registry": ["--registry ~/adapters init"],
}  # fmt: skip
# What a command writes, and the world has: it is removed first.
WRITES = {
    r"pull team/sql:v2( --from .*| --require-signature .*)?$": ["sql"],
    r"pull --locked": ["adapters"],
    r"copy \S+ \./sql$": ["sql"],
    r"convert .* \./base ": ["base"],
    r"bom ": ["sql.cdx.json"],
    r"key generate \./team": ["team.key", "team.pub"],
}
# Commands that write nothing: they run in the world itself.
READS = re.compile(
    r"(list|show \S+$|search|lineage|log|info|convert --list|explain|diff|du|scan|completion"
    r"|base (list|show hf)|train --explain|verify team|validate (?!.*(output|qwen3$))|audit verify$|fsck$"
    r"|hub (token|user|webhook|namespace|publisher|admission) list)( |$)"
)
# Words of a page, and what is there in the world.
STANDS_FOR = {
    "hf://org/sql@v1.0": "hf://org/sql@main",
    "/models/": "models/",
    "/backup/": "backup/",
    "/srv/": "srv/",
    "./copy": ".",
}


def typed() -> dict[str, list[str]]:
    """The command lines of each page, without those of tutorials, and the examples of each command."""
    lines_by_page = {
        name: [shlex.join(words) for words in shown_lines(name)] for name in ("../README.md", *PAGES) if "tutorials" not in name
    }
    entries = [entry for group in reference.entries().values() for entry in group]
    while entries:
        entry = entries.pop()
        entries += entry.subcommands
        lines_by_page[entry.name] = [
            line.partition(" > ")[0].partition(" | ")[0].partition(" < ")[0][11:] for line in entry.examples
        ]
    return {name: lines for name, lines in lines_by_page.items() if lines}


COMMANDS = typed()
LINES = sorted({line for lines in COMMANDS.values() for line in lines})


def matching(table: Iterable[str], line: str) -> list[str]:
    return [pattern for pattern in table if re.match(pattern, line)]


class World:
    """The folder, and commands that run in it or in copies of it.

    Attributes:
        digest: That of team/sql:v2, which is team/sql:prod.
        weights: That of its weights.
    """

    def __init__(self, folder: Path, servers: Callable[..., Forked], host: str, hub: Hub) -> None:
        self.folder, self._servers, self._host, self._hub = folder, servers, host, hub
        self.digest = self.weights = ""

    def run(self, line: str, folder: Path) -> subprocess.CompletedProcess[str]:
        home = folder / "home"
        variables = {"HF_ENDPOINT": self._hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}
        variables |= {"HOME": str(home), "DOCKER_CONFIG": str(folder / "docker")}
        words = [word.replace("~", str(home), 1) if word.startswith("~") else word for word in shlex.split(line)]
        words = [path for word in words for path in (sorted(glob.glob(word, root_dir=folder)) if "*" in word else [word])]
        server = self._servers(*(LEARNING if words[0] in ("run", "eval") else CHECKING))
        return server.run(words, folder, {**_environment(folder, None), **variables})

    def copied(self, folder: Path) -> Path:
        """A copy, in which weights and blobs are links: nothing writes into them."""

        def copy(source: str, target: str) -> object:
            return os.link(source, target) if "/blobs/" in source or source.endswith(_LINKED) else shutil.copy(source, target)

        return Path(shutil.copytree(self.folder, folder, symlinks=True, copy_function=copy))

    def filled(self, line: str, folder: Path) -> str:
        """A line with what is here in place of hosts, digests and folders; a push to a host has a place of its own there."""
        run_path = f"/pushed-{abs(hash(str(folder)))}" if line.startswith("push ") and "/images/" not in line else ""
        line = re.sub(r"oci://(\w+\.example|127\.0\.0\.1:8090|HOST)", f"oci://{self._host}{run_path}", line)
        line = re.sub(r"sha256:[0-9a-f]{4,}x?…?", self.digest, line.replace("s3://bucket", f"file://{folder}/bucket"))
        line = re.sub(r"--sha256 \S+", f"--sha256 {self.weights}", line)
        for word, argument in STANDS_FOR.items():
            line = line.replace(f" {word}", f" {argument}")
        return line


_LINKED = (".safetensors", ".gguf", "tokenizer.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, servers: Callable[..., Forked], host: str) -> Iterator[World]:
    models, folder = serving.make_models(tmp_path_factory.mktemp("models"), adapters=3), tmp_path_factory.mktemp("shown") / "w"
    folder.mkdir()
    for name in ("Qwen3-0.6B", "base", "SmolLM2-135M", "models/Qwen3-0.6B"):
        shutil.copytree(models.base, folder / name)
    for number, names in enumerate((("sql", "a", "from-a-stranger", "adapters/sql"), ("french", "b"), ("chat",))):
        for name in names:
            shutil.copytree(models.adapter(number), folder / name)
            config = json.loads((folder / name / "adapter_config.json").read_text())
            named_config = config | {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
            (folder / name / "adapter_config.json").write_text(json.dumps(named_config))
    for name in ("base.gguf", "smollm2.gguf"):
        shutil.copy(models.gguf, folder / name)
    for name in ("adapter_model.safetensors", "lora.safetensors"):
        shutil.copy(folder / "sql/adapter_model.safetensors", folder / name)
    for name in ("scan.json", "model.sig", "sql.cdx.json"):
        (folder / name).write_text("{}\n")
    for name in ("heldout.jsonl", "train.jsonl"):
        (folder / name).write_text('{"text": "the other thing"}\n' * 8)
    (folder / "question.txt").write_text("the\n")
    (folder / "golden.jsonl").write_text('{"prompt": "the", "not_contains": "\\u0000", "pass_rate": 0.5}\n')
    (folder / "prices.toml").write_text('[prices."team/*"]\nprompt = 0.2\nanswer = 0.8\n')
    with contextlib.closing(UsageDatabase(folder / "usage.db")):
        pass  # as a gateway creates it
    for name in ("home", "docker", "xdg"):
        (folder / name).mkdir()
    with Hub() as hub:
        commit = hub_models.publish(hub, "Qwen/Qwen3-0.6B", {file.name: file.read_bytes() for file in models.base.iterdir()})
        hub_models.cached(folder / "hf/hub", "Qwen/Qwen3-0.6B", models.base, commit)
        built_world = World(folder, servers, host, hub)
        for line in (
            "init", "push french team/french", "push french team/sql --base hf://Qwen/Qwen3-0.6B",
            "push sql team/sql:prod --base hf://Qwen/Qwen3-0.6B", "push chat team/chat:prod", "push a team/sql -m again",
            "merge team/sql:v2 team/french --method ties -o team/both", "merge team/sql:v2 team/french -o team/merged",
            "key generate team", "key generate ci", "key generate audit", "copy team/sql:v2 oci://HOST/team/sql:v2",
        ):  # fmt: skip
            result = built_world.run(built_world.filled(line, folder), folder)
            assert result.returncode == 0, (line, result.stdout, result.stderr)
        details = json.loads(built_world.run("show team/sql:v2 --json", folder).stdout)
        built_world.digest = details["digest"]
        built_world.weights = hashlib.sha256((folder / "sql/adapter_model.safetensors").read_bytes()).hexdigest()
        yield built_world


def test_what_is_not_run_here_has_a_reason_and_a_test() -> None:
    assert sorted(pattern for pattern in ELSEWHERE if not any(re.match(pattern, line) for line in LINES)) == []
    assert sorted(path for _, path in ELSEWHERE.values() if not (ROOT / path).is_file()) == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_that_is_shown_works(name: str, world: World, tmp_path: Path) -> None:
    for number, line in enumerate(COMMANDS[name]):
        if line not in TRIED and not matching(ELSEWHERE, line):
            TRIED.add(line)
            check(
                world,
                line,
                world.folder if READS.match(line) and not matching(BEFORE, line) else world.copied(tmp_path / str(number)),
            )


TRIED: set[str] = set()  # a command that several pages show is run once


def check(world: World, line: str, folder: Path) -> None:
    """Run a command in a folder, after what it needs."""
    for first in [first for pattern in matching(BEFORE, line) for first in BEFORE[pattern]]:
        result = world.run(world.filled(first, folder), folder)
        assert result.returncode == 0, (first, result.stdout, result.stderr)
    for written in [*re.findall(r" -o (\S+)", line), *(path for pattern in matching(WRITES, line) for path in WRITES[pattern])]:
        shutil.rmtree(folder / written, ignore_errors=True)
        if (folder / written).is_file():
            (folder / written).unlink()
    result = world.run(world.filled(line, folder), folder)
    expected = next((code for pattern, code in CODES.items() if re.match(pattern, line)), 0)
    assert result.returncode == expected, f"adapterhub {line}\n{result.stdout}\n{result.stderr}"
