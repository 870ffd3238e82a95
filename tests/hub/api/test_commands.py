"""Every command about names does at a hub of ours what it does in the local registry, and prints the same."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from adapterhub.cli.main import COMMANDS
from tests.conftest import Run
from tests.hub.conftest import Running

STEPS = """
push one team/sql -m first --tag stable
push two team/sql:beta -m second --metric accuracy=0.5
push one team/sql
push two other/sql
list
list --json
list team
list team/s*
list team/sql --tree
list team/sql --tree --json
list nobody => 3
search team
search sql --rank 1..64 --size <10MB --facets
search --metric accuracy>0.4 --json
search --tag stable --all-versions
show team/sql:v1 --headers-only
show team/sql:v1 --headers-only --json
show team/sql:v1
show team/sql:v9 => 3
log team/sql
log team/sql:v1 --json
log team/sql:never => 3
lineage team/sql
lineage team/sql:beta --json
lineage team/sql --dot
search --file two/adapter_model.safetensors
search --file one
search --file three/adapter_model.safetensors => 3
search --sha256 0000000000 => 3
tag team/sql:v1 prod
tag team/sql:v2 prod --expect absent => 7
tag team/sql:v2 prod --expect sha256:0000 => 7
tag team/sql:v2 prod --json
tag team/sql:prod --restore
tag team/sql:prod --protect
tag team/sql:v2 prod => 6
rm team/sql:prod => 6
tag team/sql:prod --unprotect
rm team/sql:prod
tag team/sql:prod --restore
tag team/sql:v1 latest => 6
deprecate team/sql:v1 old
deprecate other/sql gone --json
list team/sql
show team/sql:v1 --headers-only
deprecate team/sql:v1 --undo
promote team/sql:v1 staging
promote team/sql:v2 staging -m better --json
promote team/sql:v2 staging --dry-run
promote team/sql:v9 staging => 3
promote team/sql:v1 latest => 6
rollback team/sql:staging -m worse
rollback team/sql:staging => 3
withdraw team/sql:v1 => 2
withdraw team/sql:v1 -m leaked
withdraw team/sql:v1 -m leaked --json
show team/sql:v1 --headers-only
promote team/sql:v1 other => 6
withdraw team/sql:v1 --undo --json
log team/sql
du
du team --json
rm other/sql
rm team/sql:v1 => 6
show other/sql => 3
log other/sql
restore team/sql => 6
restore other/sql
list other --json
mv other/sql team/sql => 7
mv other/sql other/sql => 7
mv other/sql third/sql --json
list third
log third/sql
mv third/sql other/sql --json
list other --json
list third => 3
"""
# Their results do not depend on a registry, or are compared elsewhere: with files, a base, a model, or as an admin.
ELSEWHERE = {
    "approve", "attach", "attest", "bom", "chat", "copy", "diff", "eval", "keep", "lock", "pull", "resolve", "run", "scan",
    "serve", "sign", "validate", "verify",
}  # fmt: skip
_VARYING = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\dZ?|\d{4}-\d\d-\d\d| *(BY|alice|root) *| {2,}|-+")

_RECORDER = re.compile(r"recorded by (owner|account:alice)")  # a hub names the account that sent a measurement
_ADDRESS = re.compile(r"hub\+http://127\.0\.0\.1:\d+/")


def test_every_command_that_takes_a_remote_is_tried() -> None:
    tried = {line.split()[0] for line in STEPS.strip().splitlines()}
    with_remote = {
        name
        for name in COMMANDS
        if name != "remote"
        and "remote_option" in inspect.getsource(import_module(f"adapterhub.cli.commands.{name.replace('-', '_')}"))
    }
    assert with_remote <= tried | ELSEWHERE
    assert not tried & ELSEWHERE


def test_each_command_prints_of_a_hub_what_it_prints_of_the_registry(
    run: Run, hub: Running, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for seed, name in enumerate(("one", "two", "three")):
        shutil.copytree(adapter(seed), tmp_path / name)
    at_hub = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "ADAPTERHUB_AUTHOR": "alice"}
    run("remote", "add", "hub", hub.url.replace("http", "hub+http", 1), "--default")
    differences = []
    for line in STEPS.strip().splitlines():
        words, _, code = line.partition(" => ")
        texts = []
        for options in ((), ("--remote",)):
            result = run(*words.split(), *options, cwd=tmp_path, env=at_hub, code=None)
            texts.append(f"{result.returncode} {_printed(words, result.stdout, result.stderr)}")
        if texts[0] != texts[1] or not texts[0].startswith(f"{code or 0} "):
            differences.append((line, *texts))
    assert "Run `adapterhub list --remote`" in run("list", "nobody", "--remote", env=at_hub, code=3).stderr
    assert not differences, "\n\n".join("\n".join(difference) for difference in differences)


def test_a_version_on_a_hub_is_signed_and_verified_by_its_name_there(
    run: Run, hub: Running, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    at_hub = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    run("remote", "add", "hub", hub.url.replace("http", "hub+http", 1), "--default")
    run("key", "generate", "mine")
    run("push", adapter(7), "team/signed", "--remote", env=at_hub)
    assert "signed as team/signed" in run("sign", "team/signed", "--key", "mine.key", "--remote", env=at_hub).stdout
    assert "signed as team/signed" in run("verify", "team/signed", "--key", "mine.pub", "--remote", env=at_hub).stdout


def _printed(words: str, stdout: str, stderr: str) -> str:
    """What a command printed, without what differs: times, the author, and addresses in place of refs."""
    if words.startswith("push"):
        return ""  # it names the version at its address
    if "--json" in words:
        stdout = json.dumps(json.loads(stdout, object_hook=_timeless), indent=1)
    text = _RECORDER.sub("recorded", _ADDRESS.sub("", stdout + stderr))
    return _VARYING.sub(" ", text.replace("@", ":").replace(" --remote", ""))


def _timeless(document: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in document.items() if key not in ("time", "author", "account")}
