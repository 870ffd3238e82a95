"""`adapterhub train` as a process, on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.cli.environment import prepare_torch
from tests.conftest import LEARNING, Run, Terminal, _environment, need_module
from tests.hub.api.test_releasing import RULES, releasing
from tests.support.adapters import Make
from tests.support.forked import Forked
from tests.support.hub_models import publish
from tests.support.hub_server import Hub

WORDS = ["<unk>", "<s>", "</s>", *"abcdefgh"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, whose words are letters."""
    for name in ("torch", "transformers", "tokenizers"):
        need_module(name)
    folder = tmp_path_factory.mktemp("model")
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    numbers = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {
        "num_key_value_heads": 2,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**numbers, **sizes, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder)
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    """A config to train on it, next to its data."""
    shutil.copytree(model, tmp_path / "tiny")
    for name, text in (("train", "a b c d e f g h"), ("heldout", "c d e f")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n' * 8)
    (tmp_path / "letters.toml").write_text(
        '[base]\npath = "tiny"\n[data]\ntrain = ["train.jsonl"]\nheldout = ["heldout.jsonl"]\nsequence = 16\n'
        "[lora]\nr = 2\n[train]\nsteps = 3\nrows = 2\nthreads = 1\n"
    )
    return tmp_path / "letters.toml"


def test_training_reports_what_it_does_and_its_result(run: Run, config: Path, tmp_path: Path) -> None:
    trained = run("train", "letters.toml", "--json")
    result = json.loads(trained.stdout)
    assert list(result) == [
        "output", "steps", "tokens", "loss", "perplexity_before", "perplexity_after", "accuracy_before", "accuracy_after",
        "kept", "parameters", "memory", "report",
        "files",
    ]  # fmt: skip
    assert (result["output"], result["steps"]) == ("letters", 3)
    assert {"adapter.json", "adapter_model.safetensors"} <= {file["path"] for file in result["files"]}
    assert "trains 3.3 k of" in trained.stderr
    assert "in 4 bits" in trained.stderr
    assert "step 3/3  loss" in trained.stderr
    assert "tokens/s read" in trained.stderr
    assert "\x1b" not in trained.stderr
    assert result["report"]["tokens_per_second"] > 0
    run("validate", "letters", "--base", "tiny", "--for", "peft", "--for", "llama.cpp")
    run("push", "letters", "team/letters")
    assert json.loads(run("show", "team/letters", "--json").stdout)["manifest"]["base"]["fingerprint"]
    assert "already exists" in run("train", "letters.toml", code=2).stderr


def test_a_training_downloads_the_base_that_its_config_names_and_then_needs_no_network(
    run: Run, servers: Callable[..., Forked], config: Path, hub: Hub, tmp_path: Path
) -> None:
    commit = publish(hub, "org/tiny", {file.name: file.read_bytes() for file in (tmp_path / "tiny").iterdir()})
    (tmp_path / "tiny").rename(tmp_path / "elsewhere")
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": hub.url, "HF_TOKEN": "", "HF_TOKEN_PATH": "/none"}
    for name, base in (("on", "hf://org/tiny"), ("off", "org/tiny")):
        (tmp_path / f"{name}.toml").write_text(config.read_text().replace('"tiny"', f'"{base}"'))
    # It asks without huggingface_hub, which reads the variables as it is imported, and so may be forked.
    planned = servers(*LEARNING).run(["train", "on.toml", "--dry-run"], tmp_path, _environment(tmp_path, env))
    assert planned.returncode == 0, planned.stderr
    assert not (tmp_path / "hub").exists()
    run("train", "on.toml", env=env)
    run("train", "off.toml", env={**env, "HF_HUB_OFFLINE": "1"})
    manifest = json.loads((tmp_path / "off" / "adapter.json").read_text())
    assert (manifest["base"]["repo"], manifest["base"]["revision"]) == ("org/tiny", commit)
    assert (tmp_path / "on" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "off" / "adapter_model.safetensors"
    ).read_bytes()
    assert str(tmp_path) not in (tmp_path / "on" / "adapter.json").read_text()


def test_what_libraries_tell_programmers_is_not_shown(run: Run, config: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tiny" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "model_max_length": 4}))
    config.write_text(config.read_text() + "checkpointing = true\n")
    stderr = run("train", "letters.toml").stderr
    assert "step 3/3" in stderr
    assert "longer than" not in stderr
    assert "Warning" not in stderr


def test_training_shows_a_bar_on_a_terminal(terminal: Terminal, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = terminal("train", "letters.toml")
    assert "tokens/s" in screen
    assert "━" in screen
    assert "held-out perplexity" in screen


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[base]\npath = 'tiny'\n[data]\ntrain = ['d.jsonl']\n[train]\nlearning_rat = 1\n", "learning_rat"),
        ("[base\n", "letters.toml"),
    ],
)
def test_an_invalid_config_is_refused(run: Run, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "letters.toml").write_text(text)
    result = run("train", "letters.toml", code=2)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_plan_reports_the_memory_needed_and_trains_nothing(run: Run, config: Path, tmp_path: Path) -> None:
    stdout = run("train", "letters.toml", "--dry-run").stdout
    assert "trains 3.3 k of" in stdout
    for part in ("base", "adapter", "gradients", "optimizer", "activations", "logits", "interpreter", "peak"):
        assert f"\n{part} " in stdout
    assert "micro_rows = 1" in stdout
    assert "full fine-tuning in float32 needs at least" in stdout
    assert "\nbase: " in stdout
    plan = json.loads(run("train", "letters.toml", "--dry-run", "--json").stdout)
    memory = plan["memory"]
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    assert isinstance(plan["dequantized"], bool)
    assert {item["settings"] for item in plan["what_if"]} >= {"micro_rows = 1", "checkpointing = true", 'quantize = "none"'}
    assert not (tmp_path / "letters").exists()


def test_a_plan_is_made_for_a_card_that_is_not_here(run: Run, config: Path) -> None:
    card = ("train", "letters.toml", "--dry-run", "--set", "base.device=cuda", "--json")
    plan = json.loads(run(*card, "--memory", "24GiB").stdout)
    assert (plan["fits"], plan["free"], plan["memory"]["data"]) == (True, 24 * 2**30, 0)
    assert plan["data"]["steps"] == 3
    assert plan["data"]["seconds_at_least"] is None  # of another machine
    assert json.loads(run(*card, "--memory", "1MB", code=6).stdout)["fits"] is False
    result = run("train", "letters.toml", "--memory", "24GiB", code=2)
    assert "--memory: plans for a device, and nothing is trained on it. Add --dry-run" in result.stderr
    assert "'much' is not a size. Write it like" in run(*card, "--memory", "much", code=2).stderr


def test_a_dry_run_reads_the_data_and_counts_steps(run: Run, config: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a b", "completion": "c d"}\n' * 8)
    stdout = run("train", "letters.toml", "--dry-run").stdout
    assert "train.jsonl    prompts with completions, 8 examples" in stdout
    assert "8 to train on, 8 held out" in stdout
    assert "steps     3 of 2 rows, 16 tokens each; an epoch is 2" in stdout
    assert "at least" in stdout
    data = json.loads(run("train", "letters.toml", "--dry-run", "--json").stdout)["data"]
    assert (data["documents"], data["rows"], data["steps"], data["steps_per_epoch"]) == (8, 3, 3, 2)
    assert data["trained_tokens"] == 24
    (tmp_path / "train.jsonl").write_text('{"text": 3}\n{\n')
    result = run("train", "letters.toml", "--dry-run", code=4)
    assert [line.partition(": ")[2][:15] for line in result.stderr.splitlines()] == ["train.jsonl:1: ", "train.jsonl:2: "]
    assert len(json.loads(run("train", "letters.toml", "--dry-run", "--json", code=4).stdout)["error"]["problems"]) == 2
    (tmp_path / "train.jsonl").unlink()
    assert "train.jsonl: no such file" in run("train", "letters.toml", "--dry-run", code=3).stderr
    stderr = run("train", "letters.toml", "--dry-run", "--set", "base.path=nosuch", code=3).stderr
    assert "letters.toml: [base] path: nosuch: no such file or folder, and no base of this name" in stderr


def test_a_training_is_repeated_from_its_record_and_gives_the_same_bytes(run: Run, config: Path, tmp_path: Path) -> None:
    run("train", "letters.toml", "--push", "team/letters")
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / f"{name}-elsewhere.jsonl")
    (tmp_path / "tiny").rename(tmp_path / "base")
    data = ("--data", "train-elsewhere.jsonl", "--data", "heldout-elsewhere.jsonl")
    assert "team/letters:v1: rebuilt, every byte matches" in run("rebuild", "team/letters", "--base", "base", *data).stdout
    says = "Pass its base with --base and each file of its data with --data, to train it again from its record  [trained]"
    assert says in run("rebuild", "team/letters", code=6).stderr
    lacking = run("rebuild", "team/letters", "--base", "base", *data[:2], code=6).stderr
    assert "no file at hand has the digest of its data 'heldout.jsonl'" in lacking
    assert "Pass that file too, with --data  [other-data]" in lacking
    weights = next((tmp_path / "base").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert "and base has another. Pass that base" in run("rebuild", "team/letters", "--base", "base", *data, code=6).stderr


def test_a_record_of_a_stranger_reads_no_other_file_and_tells_no_tracker(run: Run, config: Path, tmp_path: Path) -> None:
    run("train", "letters.toml")
    path = tmp_path / "letters" / "adapter.json"
    data = ("--data", "train.jsonl", "--data", "heldout.jsonl")
    for section, changes in (("train", {"log_to": ["wandb"]}), ("data", {"chat_template": str(config)})):
        document = json.loads(path.read_text())
        document["training"]["config"][section] |= changes
        path.write_text(json.dumps(document))
        run("push", "letters", "team/letters")
        result = run("rebuild", "team/letters", "--base", "tiny", *data, "-o", section, code=6 if section == "data" else 0)
    assert "its record names a chat template, and it has none. Train it anew" in result.stderr
    assert not (tmp_path / "wandb").exists()


def test_a_value_is_set_on_the_command_line_and_recorded(run: Run, config: Path, tmp_path: Path) -> None:
    document = json.loads(run("train", "letters.toml", "--set", "train.steps=1", "--set", "lora.r=1", "--json").stdout)
    assert document["steps"] == 1
    recorded = json.loads((tmp_path / "letters" / "adapter.json").read_text())["training"]["config"]
    assert (recorded["train"]["steps"], recorded["lora"]["r"]) == (1, 1)
    stderr = run("train", "letters.toml", "--set", "train.stps=1", code=2).stderr
    assert "train.stps=1: unknown key. Did you mean steps?" in stderr


def test_a_training_that_cannot_fit_does_not_start(run: Run, config: Path, tmp_path: Path) -> None:
    huge = config.read_text().replace("sequence = 16", "sequence = 65536").replace("rows = 2", "rows = 4194304")
    config.write_text(huge)
    for extra in ([], ["--dry-run"]):
        result = run("train", "letters.toml", *extra, code=6)
        assert "are free" in result.stderr
        assert "--force" in result.stderr
        assert result.stderr.endswith("[training-memory]\n")
        assert result.stderr.count("\n") == 1
        assert ("\npeak " in result.stdout) == bool(extra)
    assert json.loads(run("train", "letters.toml", "--dry-run", "--json", code=6).stdout)["fits"] is False
    assert "peak" in run("train", "letters.toml", "--dry-run", "--force").stdout
    assert not (tmp_path / "letters").exists()


def test_a_training_is_pushed_and_continues_from_the_pushed_version(run: Run, config: Path, tmp_path: Path) -> None:
    document = json.loads(run("train", "letters.toml", "--push", "team/letters:first", "--json").stdout)
    assert (document["pushed"]["ref"], document["pushed"]["tags"]) == ("team/letters:v1", ["first", "latest"])
    stdout = run("train", "letters.toml", "-o", "more", "--from", "team/letters:first", "--push", "team/letters").stdout
    assert "pushed team/letters:v2" in stdout
    nodes = json.loads(run("lineage", "team/letters:v2", "--json").stdout)["nodes"]
    assert [node["how"] for node in nodes if "team/letters:v2" in node["refs"]] == ["trained further"]
    again = run("rebuild", "team/letters:v2", code=6).stderr
    assert "Pass its base with --base and each file of its data with --data" in again


def test_held_out_data_that_became_less_likely_are_a_warning(run: Run, config: Path) -> None:
    assert "less likely" not in run("train", "letters.toml", "-o", "better").stderr
    config.with_name("heldout.jsonl").write_text('{"text": "h g f e d c b a"}\n')  # the training texts, backward
    assert "became less likely" in run("train", "letters.toml", "-o", "worse", "--set", "train.learning_rate=0.3").stderr


def test_an_evaluation_of_pairs_tells_how_many_are_preferred(run: Run, config: Path, tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "a b", "chosen": "c d", "rejected": "e f"}) + "\n"
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(pair * 4)
    result = run("train", "letters.toml", "--set", "preference.method=orpo", "--set", "train.steps=1")
    assert result.returncode == 0, result.stderr
    assert "step 0/1: held-out pairs: " in result.stderr
    assert "% preferred, margin " in result.stderr


def test_the_trainer_signs_what_it_did_for_the_version_that_it_pushes(run: Run, config: Path, tmp_path: Path) -> None:
    run("key", "generate", "trainer")
    rules = 'builders = ["urn:adapterhub:trainer"]\nformats = ["peft"]\nrecorders = ["trainer"]\nmax_rank = 2\n'
    policy = f'[policy]\n{rules}[policy.attestations."*"]\ntraining = ["trainer.pub"]\n'
    (tmp_path / "adapterhub.toml").write_text(policy)
    assert "nothing is pushed" in run("train", "letters.toml", "--key", "trainer.key", code=2).stderr
    words = ("train", "letters.toml", "--push", "team/letters", "--key", "trainer.key", "--json")
    document = json.loads(run(*words).stdout)
    (signed,) = document["attestations"]
    assert signed["predicate"]["runDetails"]["builder"]["id"] == "urn:adapterhub:trainer"
    data, base = ["--data", "train.jsonl", "--data", "heldout.jsonl"], ["--base", "tiny"]
    check = ("verify", "team/letters", "--attestations", "--key", "trainer.pub", "--recompute", *base, *data)
    assert "training attested by trainer.pub (inputs compared, training not repeated)" in run(*check).stdout
    run("pull", "team/letters", "-o", "out")
    # The record in another version has no such signature.
    (tmp_path / "out" / "README.md").write_text("# Better letters\n")
    assert "no attestation 'training'" in run("push", "out", "team/forged", code=6).stderr


def test_a_push_that_cannot_be_is_refused_before_and_one_that_fails_keeps_the_folder(
    run: Run, config: Path, tmp_path: Path
) -> None:
    assert "assigns the number itself" in run("train", "letters.toml", "--push", "team/letters:v3", code=2).stderr
    run("train", "letters.toml", "--push", "team/letters:prod", "-o", "one")
    run("tag", "team/letters:prod", "--protect")
    assert "is protected" in run("train", "letters.toml", "--push", "team/letters:prod", code=6).stderr
    run("tag", "team/letters:prod", "--unprotect")
    run("rm", "team/letters")
    assert "this name was removed" in run("train", "letters.toml", "--push", "team/letters", code=7).stderr
    assert not (tmp_path / "letters").exists()
    (tmp_path / "adapterhub.toml").write_text("[policy.metrics]\ntrain_loss = { max = 0.001 }\n")
    result = run("train", "letters.toml", "--push", "team/other", code=6)
    assert "The adapter is in letters; `adapterhub push ./letters team/other` tries again" in result.stderr
    assert (tmp_path / "letters" / "adapter.json").exists()


@pytest.mark.parametrize(
    ("policy", "options", "problem"),
    [
        ('licenses = ["MIT"]', (), "licenses: its license is not declared, not MIT"),
        ("max_rank = 1", (), "max_rank: rank 2 is over 1"),
        ('recorders = ["owner"]', (), "recorders: its training was recorded by trainer, not owner"),
        ('[policy.attestations."*"]\ntraining = ["trainer.pub"]', (), "the training is not signed by one of its keys"),
        ('[policy.attestations."*"]\ntraining = ["other.pub"]', ("--key", "trainer.key"), "is not signed by one of its keys"),
        ('[policy.attestations."*"]\ntests = ["trainer.pub"]', ("--key", "trainer.key"), "makes no attestation of tests"),
        ('[policy.signers]\n"team/*" = ["trainer.pub"]', (), "a training makes no signature of its files"),
    ],
)
def test_a_rule_that_the_trained_adapter_cannot_meet_refuses_the_push_before_the_first_step(
    run: Run, config: Path, tmp_path: Path, policy: str, options: tuple[str, ...], problem: str
) -> None:
    for name in ("trainer", "other"):
        run("key", "generate", name)
    (tmp_path / "adapterhub.toml").write_text(f"[policy]\n{policy}\n")
    stderr = run("train", "letters.toml", "--push", "team/letters", *options, code=6).stderr
    assert problem in stderr
    assert "step 1" not in stderr
    assert not (tmp_path / "letters").exists()


def test_a_tag_whose_requirements_no_new_version_meets_is_refused_before_the_first_step(
    run: Run, config: Path, tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with releasing(tmp_path, make) as hub:
        address = f"{hub.url.replace('http', 'hub+http', 1)}/team/letters"
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        refusals = [run("train", "letters.toml", "--push", f"{address}@prod", code=6).stderr]
        assert run("list", address, code=3)
    (tmp_path / "adapterhub.toml").write_text(RULES)
    run("init")
    refusals.append(run("train", "letters.toml", "--push", "team/letters:prod", code=6).stderr)
    for refusal in refusals:
        assert "approvals: 0 of 1 (needed: 1" in refusal
        assert "step 1" not in refusal
    assert not (tmp_path / "letters").exists()


def test_a_remote_is_asked_before_the_first_step_whether_it_takes_the_push(
    run: Run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("key", "generate", "trainer")
    words = ("train", "letters.toml", "--push")
    with Hub(token="hf_right") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert "HF_TOKEN" in run(*words, "hf://team/letters", code=5).stderr
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert "HTTP 401" in run(*words, "hf://team/letters", code=5).stderr
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert "user is not in other" in run(*words, "hf://other/letters", code=5).stderr
        hub.role = "read"
        assert "its token is read-only" in run(*words, "hf://team/letters", code=5).stderr
        hub.role = "write"
        refused = run(*words, "hf://team/letters", "--key", "trainer.key", code=2)
        assert "a hub has no attachments" in refused.stderr
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert "127.0.0.1: connection refused" in run(*words, "hf://team/letters", code=5).stderr
    assert not (tmp_path / "letters").exists()
    assert not hub.repos


def test_an_adapter_is_measured_against_its_base_and_gated(run: Run, config: Path, tmp_path: Path) -> None:
    run("init")
    before = json.loads(run("train", "letters.toml", "--push", "team/letters", "--json").stdout)
    eval_options = ("--data", "heldout.jsonl", "--base", "tiny", "--threads", "1")
    document = json.loads(run("eval", "team/letters", *eval_options, "--gate", "ppl<1000", "--json").stdout)
    assert document["metrics"]["perplexity"] == before["perplexity_after"]
    assert (document["ok"], document["recorded"], document["ref"]) == (True, "team/letters:v1", "team/letters:v1")
    assert document["gates"] == [
        {"gate": "ppl<1000", "metric": "perplexity", "value": document["metrics"]["perplexity"], "ok": True}
    ]
    bound = f"eval_perplexity<{document['metrics']['perplexity'] + 0.1:.3f}"
    assert json.loads(run("search", "--metric", bound, "--json").stdout)["total"] == 1
    assert json.loads(run("show", "team/letters", "--json").stdout)["evaluations"][0]["metrics"] == document["metrics"]
    stdout = run("eval", "./letters", *eval_options, "--gate", "ppl/base<0.001", code=1).stdout
    assert "with the adapter" in stdout
    assert "FAILED: ppl/base<0.001" in stdout
    assert "recorded" not in stdout


@pytest.mark.usefixtures("config")
def test_data_sets_have_results_and_gates_of_their_own_and_are_compared_with_another_version(run: Run, tmp_path: Path) -> None:
    run("init")
    for steps in (1, 3):
        run("train", "letters.toml", "-o", f"s{steps}", "--set", f"train.steps={steps}", "--push", "team/letters")
    (tmp_path / "many.jsonl").write_text("".join(f'{{"text": "{" ".join("abcdefgh"[n % 8 :] * 2)}"}}\n' for n in range(12)))
    words = ("eval", "team/letters:v2", "--base", "tiny", "--threads", "1", "--data", "few=heldout.jsonl")
    compared = (*words, "--data", "many=many.jsonl", "--against", "team/letters:v1")
    gates = ("--gate", "ppl<1000", "--gate", "many_ppl/against<100", "--gate", "few_ppl/against<100")
    document = json.loads(run(*compared, *gates, "--json", code=1).stdout)
    small, large = document["evaluations"]
    assert [small["name"], large["name"], document["recorded"]] == ["few", "many", "team/letters:v2"]
    assert (large["against"]["ref"], large["against"]["documents"]) == ("team/letters:v1", 12)
    assert large["metrics"]["perplexity_against"] == large["against"]["perplexity_ratio"]
    assert [(gate["gate"], gate["ok"]) for gate in large["gates"]] == [("ppl<1000", True), ("ppl/against<100", True)]
    assert [gate["ok"] for gate in small["gates"]] == [True, False]
    assert small["gates"][1]["reason"].startswith("cannot tell yet: 8 of at least 10 documents needed")
    assert {item["name"] for item in json.loads(run("show", "team/letters", "--json").stdout)["evaluations"]} >= {"few", "many"}
    text = run(*words, "--against", "base", "--no-record", "--gate", "ppl/against<100", code=1).stdout
    assert "perplexity relative to base: " in text
    assert "FAILED: ppl/against<100 (cannot tell yet: 8 of at least 10 documents needed" in text
    # A folder of that name is the adapter that was named, whatever it is compared with.
    (tmp_path / "s1").rename(tmp_path / "base")
    eval_options = ("--base", "tiny", "--threads", "1", "--data", "many.jsonl", "--against", "team/letters:v2", "--json")
    of_folder, of_version = (
        json.loads(run("eval", source, *eval_options, "--no-record").stdout) for source in ("base", "team/letters:v1")
    )
    assert of_folder["metrics"] == of_version["metrics"]


@pytest.mark.parametrize(
    ("extra", "says", "code"),
    [
        (["--gate", "ppl/against<1"], "compares two versions", 2),
        (["--gate", "ppl/against>1", "--against", "base"], "is no comparison of perplexities", 2),
        (["--data", "sql=train.jsonl", "--name", "sql-test"], "no such file or folder", 3),
        (["--data", "B d=train.jsonl"], "not a valid name for an evaluation", 2),
        (["--gate", "bleu>1"], "is not measured", 2),
        (["--gate", "ppl"], "is not a comparison", 2),
        (["--name", "A b"], "not a valid name for an evaluation", 2),
        (["--base", "nowhere"], "no such file or folder", 3),
    ],
)
def test_an_invalid_evaluation_is_refused(run: Run, tmp_path: Path, extra: list[str], says: str, code: int) -> None:
    result = run("eval", "./letters", "--data", "heldout.jsonl", "--base", "tiny", *extra, code=code)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_new_config_trains_when_its_paths_are_filled_in(run: Run, config: Path, tmp_path: Path) -> None:
    assert "wrote new.toml" in run("train", "--init", "new.toml").stdout
    assert "already exists" in run("train", "--init", "new.toml", code=2).stderr
    new = tmp_path / "new.toml"
    new.write_text(new.read_text().replace('path = "model"', 'path = "tiny"'))
    assert "trains" in run("train", "new.toml", "--dry-run").stdout
    assert json.loads(run("train", "new.toml", "-o", "new", "--json").stdout)["steps"] == 1


def test_defaults_are_explained_one_or_all(run: Run) -> None:
    stdout = run("train", "--explain", "targets").stdout
    assert stdout.startswith('[lora] targets = "all-linear"\n')
    assert "QLoRA paper" in stdout
    keys = json.loads(run("train", "--explain", "--json").stdout)["keys"]
    assert {key["section"] for key in keys} == {"base", "data", "lora", "train", "preference", "card"}
    assert "Did you mean targets?" in run("train", "--explain", "target", code=2).stderr
    assert "takes one of CONFIG, --init and --explain" in run("train", code=2).stderr


def test_threads_of_torch_wait_shortly_unless_the_user_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    prepare_torch()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    prepare_torch()
    assert os.environ["GOMP_SPINCOUNT"] in ("0", "1000")


def test_cuda_is_told_before_it_starts_to_give_the_same_bytes_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    prepare_torch()
    assert (os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["PYTORCH_CUDA_ALLOC_CONF"]) == (
        ":4096:8", "expandable_segments:True",
    )  # fmt: skip
