"""For each error whose hint the command line words: a line that ends with it, and what the hint leaves to the reader.

A line runs in a small world: folders with a base, another one, and adapters; a registry that has one of them as team/sql.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
import socket
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adapterhub.registry.registry import Registry
from adapterhub.registry.repository_documents import Repository
from adapterhub.registry.repository_records import Repositories
from adapterhub.serve.usage.answer_log import AnswerRecord
from adapterhub.serve.usage.usage_database import UsageDatabase
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from tests.support.folders import adapter, base, pairs

Step = str | Callable[[Path], object]


@dataclass(frozen=True)
class Provocation:
    """A line that ends with an error.

    Attributes:
        line: The line, without the name of the program.
        before: What comes first: other lines, and functions of the folder of the world.
        values: What a reader writes for each word in capitals in the commands of the hint.
        then: The line that does what the hint says beside its commands; empty if it says nothing else.
        finding: The code of a finding whose remedy the hint is; empty for an error.
    """

    line: str
    before: Sequence[Step] = ()
    values: Mapping[str, str] = field(default_factory=dict)
    then: str = ""
    finding: str = ""


def world(folder: Path) -> None:
    """Write the folders of the world."""
    base(folder / "base", 2)
    base(folder / "larger", 2, size=16)
    adapter(folder / "sql", pairs(2))
    adapter(folder / "other", pairs(1))
    adapter(folder / "wrong", pairs(2), r=3)
    shutil.copyfile(folder / "sql" / peft.WEIGHTS, folder / "alone.safetensors")
    adapter(folder / "bare", pairs(2))
    (folder / "bare" / peft.CONFIG).write_text("{}")
    magnitudes = {f"model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector": (8,) for layer in range(2)}
    adapter(folder / "dora", {**pairs(2), **magnitudes}, use_dora=True)


def _write(name: str, text: str) -> Step:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return write


def _drop_a_tensor(folder: Path) -> None:
    path = folder / "wrong" / peft.WEIGHTS
    with contextlib.closing(safetensors_file.SafetensorsFile(path)) as file:
        arrays = dict(file.arrays(as_views=False))
    arrays.popitem()
    safetensors_file.write(path, arrays, {"format": "pt"})


def _flip(folder: Path) -> None:
    content = (folder / "sql" / peft.WEIGHTS).read_bytes()
    path = folder / ".adapterhub/blobs/sha256" / hashlib.sha256(content).hexdigest()
    path.chmod(0o600)
    path.write_bytes(bytes(len(content)))


def _lose(folder: Path) -> None:
    content = (folder / "sql" / peft.WEIGHTS).read_bytes()
    (folder / ".adapterhub/blobs/sha256" / hashlib.sha256(content).hexdigest()).unlink()


def _move_base(folder: Path) -> None:
    (folder / "base").rename(folder / "moved")


def _index_of_a_newer_program(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "registry.db")) as database:
        database.execute("PRAGMA user_version = 99")


def _declare_training(folder: Path) -> None:
    (folder / "sql/adapter.toml").write_text("[training]\nconfig = {train = {steps = 3}}\n")


def _serve_once(folder: Path) -> None:
    UsageDatabase(folder / "other/usage.db").close()


def _lose_base(folder: Path) -> None:
    [path] = [path for path in (folder / ".adapterhub/blobs/sha256").iterdir() if b'"text_type"' in path.read_bytes()]
    path.unlink()


def _pickle(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(pickle.dumps({}))


def _link_project(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "adapters").symlink_to(folder / "elsewhere")


def _link_store(folder: Path) -> None:
    (folder / ".adapterhub").rename(folder / "store")
    (folder / ".adapterhub").symlink_to(folder / "store")


def _record_answer(folder: Path) -> None:
    with contextlib.closing(UsageDatabase(folder / "other/usage.db")) as database, database.transaction():
        version = f"team/sql@sha256:{'5' * 64}"
        answer = AnswerRecord("a", "b", 0.0, "ada", version, "sql", "team/sql", "vllm", "/v1/completions", 200, 0.5, 2, 1)
        database.add_answers([answer], [])


def _quantize(folder: Path) -> None:
    shutil.copytree(folder / "base", folder / "gptq")
    config = json.loads((folder / "base/config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "gptq/config.json").write_text(json.dumps(config))


def _split_torchtune(folder: Path) -> None:
    names = {f"layers.0.attn.q_proj.lora_{half}.weight": np.ones((2, 8) if half == "a" else (8, 2)) for half in "ab"}
    safetensors_file.write(folder / "tune.safetensors", {name: array.astype(np.float32) for name, array in names.items()})


def _mix_models(folder: Path) -> None:
    modules = (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
    )
    pair = {"lora_down": np.ones((2, 8), np.float32), "lora_up": np.ones((8, 2), np.float32)}
    tensors = {f"{module}.{name}.weight": array for module in modules for name, array in pair.items()}
    alphas = {f"{module}.alpha": np.array(2, np.float32) for module in modules}
    safetensors_file.write(folder / "xl.safetensors", tensors | alphas)


def _misnumber_tag(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "registry.db")) as database, database:
        database.execute("UPDATE tags SET number = 1 WHERE tag = 'latest'")


def _replace_entry(content: Callable[[Path], bytes]) -> Step:
    def replace(folder: Path) -> None:
        first = folder / ".adapterhub/refs/team/sql/00000001.json"
        first.chmod(0o600)
        first.write_bytes(content(first))

    return replace


def _own_by_hub(folder: Path) -> None:
    with Registry.open(folder) as registry:
        Repositories(registry).change("team/sql", lambda _: Repository(private=True))


_PORT = socket.create_server(("127.0.0.1", 0))
"""A port in use, which ends what would serve if the error before it were not."""
_AT_PORT = f"--port {_PORT.getsockname()[1]}"
_SERVE = "serve team/sql --base base --engine torch"
_URL, _PULL = "oci+http://127.0.0.1:9/team", "pull team/sql -o out --remote team"
_PROJECT = f'[remotes]\nteam = {{url = "{_URL}"}}\n'
_ORPHAN = hashlib.sha256(b"x").hexdigest()
_KEY = "key generate team"
_GATE = "[promote.prod.require]\napprovals = 1\n"
_ODD = json.dumps({"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7"})
_KEPT = "merge team/sql --into base --recipe-only -o kept"

PROVOCATIONS: dict[str, Provocation] = {
    "add-base": Provocation("fsck", ["base add tiny base", _lose_base], {"BASE": "base"}, finding="missing"),
    "address-with-remote": Provocation(
        "pull oci+http://127.0.0.1:9/x -o out --remote team",
        ["remote add team oci+http://127.0.0.1:9/team"],
        then="pull team/sql -o out",
    ),
    "alpha-or-rslora-required": Provocation(
        "convert alone.safetensors out --to peft", then="convert alone.safetensors out --to peft --alpha 4"
    ),
    "alpha-recorded": Provocation(
        "convert raw.safetensors out --to peft --alpha 4",
        ["convert sql raw.safetensors --to raw"],
        then="convert raw.safetensors out --to peft",
    ),
    "alpha-required": Provocation(
        "convert tune.safetensors out --to peft --base base",
        [_split_torchtune],
        then="convert tune.safetensors out --to peft --base base --alpha 4",
    ),
    "as-trained": Provocation("merge sql --into base --onto as-trained -o out", then="merge sql --into base -o out"),
    "attested-base": Provocation(
        "verify team/sql --attestations --recompute --key team.pub",
        [_KEY, "attest team/sql --fits base --key team.key"],
        then="verify team/sql --attestations --recompute --key team.pub --base base",
        finding="attestation",
    ),
    "base-name-taken": Provocation("base add tiny larger", ["base add tiny base"], then="base add tiny larger --force"),
    "base-required": Provocation("convert sql sql.gguf", then="convert sql sql.gguf --base base"),
    "broken-index": Provocation("list", [_write("registry.db", "no database")], then="list"),
    "check-failed": Provocation("push wrong team/new"),
    "check-failed-for-good": Provocation("push wrong team/new", [_drop_a_tensor]),
    "check-failed-for-good-on-base": Provocation("attest team/sql --fits larger --key team.key", [_KEY]),
    "check-failed-on-base": Provocation("push sql team/new --base larger"),
    "check-failed-to-convert": Provocation("convert wrong out --to mlx", then="convert wrong out --to mlx --force"),
    "check-failed-to-convert-on-base": Provocation(
        "convert sql sql.gguf --base larger", then="convert sql sql.gguf --base larger --force"
    ),
    "check-registry": Provocation("log team/sql", [_replace_entry(lambda _: b"{}")]),
    "collect-garbage": Provocation("fsck", [_write(f".adapterhub/blobs/sha256/{_ORPHAN}", "x")], finding="orphans"),
    "config-key": Provocation("train --explain nosuch"),
    "convert-there": Provocation("pull oci+http://127.0.0.1:9/team/sql --to mlx -o out"),
    "convert-to-peft": Provocation("fix mlx -o out", ["convert sql mlx --to mlx"], {"DST": "peft"}, then="fix peft -o out"),
    "cors-needs-keys": Provocation(f"{_SERVE} --cors * --port 0", then=f"{_SERVE} --cors https://a.example {_AT_PORT}"),
    "credentials-in-address": Provocation("pull oci+http://ada:secret@127.0.0.1:9/team/sql -o out"),
    "expect-unsupported": Provocation("push sql layout://x.tar:v1 --expect absent", then="push sql layout://x.tar:v1"),
    "gateway-needs-keys": Provocation(
        f"{_SERVE} --host 0.0.0.0 --behind-proxy --port 0",
        [_write("routes.toml", f'[keys.ada]\nsha256 = "{hashlib.sha256(b"k").hexdigest()}"\n')],
        then=f"{_SERVE} --host 0.0.0.0 --behind-proxy --route routes.toml {_AT_PORT}",
    ),
    "gguf-type-for-folder": Provocation(
        "merge sql --into base -o out --requantize q8_0", then="merge sql --into base -o out --dtype bf16"
    ),
    "has-children": Provocation("rm team/sql -y", ["merge team/sql ./other -o team/both"], then="rm team/sql -y --force"),
    "hub-needs-login": Provocation(
        "hub start --host 0.0.0.0 --behind-proxy", then=f"hub start --host 0.0.0.0 --behind-proxy --require-login {_AT_PORT}"
    ),
    "image-here": Provocation("push sql team/image --to image", then="push sql layout://x.tar:v1 --to image"),
    "keys-required": Provocation(
        "pull team/sql -o out --require-signature",
        [_KEY, "sign team/sql --key team.key"],
        then="pull team/sql -o out --require-signature --key team.pub",
    ),
    "keys-to-approve": Provocation(
        "approve team/sql:v1 --for prod -m fine", [_KEY], then="approve team/sql:v1 --for prod -m fine --key team.key"
    ),
    "latest-tag": Provocation(
        "tag team/sql:v1 latest", ["push other team/sql"], {"VERSION": "v2", "REASON": "wrong"}, then="pull team/sql -o out"
    ),
    "link-in-project": Provocation("pull --locked", ["lock team/sql", _link_project], {"FOLDER": "out"}),
    "linked-store": Provocation("list", [_link_store, "init another"], then="list --registry another"),
    "local-only": Provocation("lineage oci+http://127.0.0.1:9/team/sql"),
    "look-at-log": Provocation("rollback team/sql:prod", ["tag team/sql:v1 prod"]),
    "loss-not-allowed": Provocation(
        "convert dora out --to litgpt --base base", then="convert dora out --to litgpt --base base --allow-approx"
    ),
    "misplaced": Provocation(
        "log team/sql",
        ["push other team/sql", _replace_entry(lambda first: first.with_name("00000002.json").read_bytes())],
    ),
    "name-of-base-and-adapter": Provocation(
        f"{_SERVE} --base-name team/sql --port 0", then=f"{_SERVE} --base-name tiny {_AT_PORT}"
    ),
    "newer-index": Provocation("list", [_index_of_a_newer_program], then="list"),
    "no-gguf-architecture": Provocation("convert sql sql.gguf --base odd", [_write("odd/config.json", _ODD)], {"OUT": "out"}),
    "no-lock-file": Provocation("pull --locked", values={"REF": "team/sql"}, then="pull --locked"),
    "no-registry": Provocation("list --registry new", then="list --registry new"),
    "no-rollout": Provocation("rollout show team/sql"),
    "no-such-account": Provocation("hub member set team nobody --role read"),
    "no-such-adapter": Provocation("show legal/terms"),
    "no-such-answer": Provocation("served b", [_serve_once, _record_answer], then="served b --usage-file other/usage.db"),
    "no-such-base": Provocation("base show nosuch"),
    "no-such-number": Provocation("hub token revoke 7"),
    "no-such-recipe": Provocation("rebuild --remove nosuch"),
    "no-such-tag": Provocation("show team/sql:nosuch"),
    "no-such-version": Provocation("show team/sql:v9"),
    "no-time": Provocation(
        "bom team/sql --spdx -o out.json", then="bom team/sql --spdx -o out.json --created 2026-11-26T00:00:00Z"
    ),
    "no-usage": Provocation("usage", [_serve_once], then="usage --usage-file other/usage.db"),
    "not-stored": Provocation("serve ./other --base base"),
    "not-locked": Provocation(
        "pull --locked team/new", ["lock team/sql", "push other team/new"], then="pull --locked team/new"
    ),
    "nothing-to-attest": Provocation("attest team/sql --key team.key", [_KEY], then="attest team/sql --key team.key --scan"),
    "other-base": Provocation("rebuild kept -o out --base larger", [_KEPT], then="rebuild kept -o out --base base"),
    "other-base-shapes": Provocation("describe sql --base larger"),
    "other-builder": Provocation(
        "attest team/sql --training --builder urn:adapterhub:trainer --key team.key",
        [_KEY],
        {"CONFIG": "nosuch.toml", "NAMESPACE/NAME": "team/trained", "PEM": "team.key"},
        then="attest team/sql --training --key team.key",
    ),
    "other-recorder": Provocation(
        "attest team/declared --training --key team.key",
        [_KEY, _declare_training, "push sql team/declared"],
        then="attest team/declared --training --key team.key --builder https://ci.example",
    ),
    "output-exists": Provocation("pull team/sql -o sql", then="pull team/sql -o sql --replace"),
    "peft-type-missing": Provocation("convert bare out --to mlx", then="convert bare-fixed out --to mlx"),
    "pickle": Provocation(
        "convert weights.bin out --to peft", [_pickle], then="convert weights.bin out --to peft --unsafe-pickle"
    ),
    "protected": Provocation(
        "tag team/sql:v2 prod",
        ["tag team/sql:v1 prod", "tag team/sql:prod --protect", "push other team/sql"],
        then="tag team/sql:v2 prod",
    ),
    "public-needs-tls": Provocation(
        "hub start --host 0.0.0.0 --require-login",
        then=f"hub start --host 0.0.0.0 --require-login --behind-proxy {_AT_PORT}",
    ),
    "quantized-base": Provocation("merge sql --into gptq -o out", [_quantize], then="merge sql --into base -o out"),
    "reason-required": Provocation("withdraw team/sql:v1", then="withdraw team/sql:v1 -m wrong"),
    "recipe-adapter-missing": Provocation(
        "rebuild kept.json -o out",
        ["merge ./other --into base --recipe-only -o kept.json"],
        then="rebuild kept.json -o out --adapter ./other",
    ),
    "rebuild-index": Provocation("show team/sql", ["push other team/sql", _misnumber_tag], then="show team/sql"),
    "recipe-adapter-moved": Provocation(
        "rebuild kept.json -o out",
        [
            "push ./other layout://images:sql",
            "merge layout://images:sql --into base --recipe-only -o kept.json",
            "push ./sql layout://images:sql",
        ],
        then="rebuild kept.json -o out --adapter ./other",
    ),
    "recipe-base-elsewhere": Provocation("rebuild kept -o out", [_KEPT, _move_base], then="rebuild kept -o out --base moved"),
    "recipe-base-required": Provocation(
        "rebuild team/based", ["push sql team/based --to gguf --base base"], then="rebuild team/based --base base"
    ),
    "recipe-name-taken": Provocation(
        "merge team/other --into base --recipe-only -o kept",
        [_KEPT, "push other team/other"],
        then="merge team/other --into base --recipe-only -o kept",
    ),
    "ref-as-remote": Provocation(
        "remote add team/sql oci+http://127.0.0.1:9/x", then="remote add team oci+http://127.0.0.1:9/x"
    ),
    "removed": Provocation("pull team/sql -o out", ["rm team/sql -y"], then="pull team/sql -o out"),
    "removed-name": Provocation("push sql team/sql", ["rm team/sql -y"], then="push sql team/sql"),
    "repair": Provocation("fsck", [_flip], {"SRC": "sql"}, then="fsck", finding="flipped"),
    "repair-missing": Provocation("fsck", [_lose], {"SRC": "sql"}, then="fsck", finding="missing"),
    "repository-of-hub": Provocation(
        "mv team/sql team/text",
        [_own_by_hub, "remote add team hub+http://127.0.0.1:9 --default"],
        {"OLD": "team/sql", "NEW": "team/text"},
    ),
    "requirements-unmet": Provocation("tag team/sql:v1 prod", [_write("adapterhub.toml", _GATE)]),
    "several-models": Provocation(
        "convert xl.safetensors out --to peft",
        [_mix_models],
        then="convert xl.safetensors out --to peft --allow-drop 'text_encoder.*'",
    ),
    "signature-missing": Provocation(
        "pull team/sql -o out --require-signature --key team.pub",
        [_KEY, "push sql layout://signed:v1", "sign layout://signed:v1 --key team.key"],
        {"FROM": "layout://signed:v1"},
    ),
    "signature-name": Provocation(
        "pull other/copy -o out --require-signature --key team.pub",
        [_KEY, "sign team/sql:v1 --key team.key", "copy team/sql:v1 other/copy"],
        then="pull other/copy -o out --require-signature --key team.pub --signed-as team/sql",
    ),
    "store-of-registry": Provocation("push sql layout://.adapterhub:v1"),
    "t-for-weights": Provocation(
        "merge sql other --method slerp --weights 0.5,0.5 -o out", then="merge sql other --method slerp --set t=0.5 -o out"
    ),
    "token-without-tls": Provocation("login hub+http://hub.example"),
    "two-types": Provocation(
        "merge sql --into base.gguf -o out.gguf --dtype f16 --requantize q8_0",
        ["convert base base.gguf"],
        then="merge sql --into base.gguf -o out.gguf --dtype f16",
    ),
    "unknown-folder": Provocation("list", [_write("adapterhub.toml", 'registry = "/elsewhere"\n')]),
    "unknown-host": Provocation(_PULL, [_write("adapterhub.toml", _PROJECT)], {"NAME": "mine", "URL": _URL}, _PULL),
    "unknown-method": Provocation("merge --explain nosuch"),
    "unnamed-version": Provocation(
        "eval team/sql --import j.xml",
        [_write("j.xml", '<testsuite name="sql"><testcase name="a"/></testsuite>')],
        then="eval team/sql --import j.xml --trust-name",
    ),
    "version-stays": Provocation("rm team/sql:v1", values={"REASON": "wrong"}),
    "withdrawn": Provocation("pull team/sql:v1 -o out", ["withdraw team/sql:v1 -m wrong"]),
}

# Code to the test that ends with it, where no line of this world does.
ELSEWHERE = {
    "adapter-lost": "merging/into_base/test_loss_estimate.py",
    "adapter-lost-in-nf4": "merging/into_base/test_nf4_writer.py",
    "bundled-embeddings": "converters/test_kohya.py",
    "checkpoint-elsewhere": "training/test_replay.py",
    "command-not-allowed": "evidence/test_answer_checks.py",
    "delete-and-rebuild": "store/test_tensor_digests.py",
    "image-repacked": "remotes/test_adapter_image.py",
    "login-required": "remotes/test_named_remotes.py",
    "no-device-login": "remotes/test_hub_login.py",
    "no-kept-checkpoint": "training/test_replay.py",
    "no-such-part": "training/test_replay.py",
    "other-data": "cli/test_train_command.py",
    "passphrase-required": "trust/test_signers.py",
    "rows-not-whole-blocks": "test_error_codes.py",
    "signed-version": "registry/test_withdrawals.py",
    "source-damaged": "remotes/test_protocol.py",
    "sum-too-large": "merging/into_base/test_plan_folder.py",
    "torchtune-export": "converters/test_quirks.py",
    "trained": "cli/test_train_command.py",
    "training-memory": "cli/test_train_command.py",
    "training-stopped": "training/test_trainer.py",
    "type-not-writable": "merging/into_base/test_plan_gguf.py",
    "withdrawn-by-another": "hub/api/test_releasing.py",
}
