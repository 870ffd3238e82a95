"""Libraries that push and load by the API of the Hugging Face Hub, unmodified: peft, transformers and trl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub.ref import Ref
from tests.conftest import ROOT, Run, need_module
from tests.hub.conftest import Running, hub
from tests.hub.sending import Sending
from tests.remotes.test_hub_peers import UPLOAD, theirs
from tests.support.hub_server import TOKEN, Hub

__all__ = ["hub"]

pytestmark = pytest.mark.peer
START = """
import json, sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.support import tiny
base = tiny.model()
base.name_or_path = "org/tiny"
lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
"""
PEFT = """
pushed = get_peft_model(base, lora)
made = pushed.push_to_hub("alice/Tiny-LoRA", private=True)
ids = torch.arange(8)[None]
wanted = pushed(ids).logits
loaded = PeftModel.from_pretrained(tiny.model(), "alice/Tiny-LoRA")
into = tiny.model()
into.load_adapter("alice/tiny-lora")
same = [torch.equal(wanted, model(ids).logits) for model in (loaded, into)]
print(json.dumps([made.oid, same]))
"""
TRL = """
import os
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"abcdefghij"])}
inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
args = SFTConfig(sys.argv[1], max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="steps",
                 save_steps=1, push_to_hub=True, hub_model_id="alice/sft", bf16=False, gradient_checkpointing=False)
rows = Dataset.from_dict({"text": ["a b c d", "e f g h"]})
trainer = SFTTrainer(base, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
trainer.train()
trainer.push_to_hub()
loaded = PeftModel.from_pretrained(tiny.model(), "alice/sft")
print(json.dumps(sorted(name for name, _ in loaded.named_parameters() if "lora" in name)[:1]))
"""


def printed(hub: Running, tmp_path: Path, script: str, *words: object) -> str:
    """The last line of what a script printed."""
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "converters", "schemas"))
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": paths}
    command = [sys.executable, "-c", START + script, *map(str, words)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


def test_peft_pushes_a_version_that_peft_and_transformers_load(hub: Running, tmp_path: Path) -> None:
    oid, same = json.loads(printed(hub, tmp_path, PEFT))
    assert same == [True, True]
    with hub.registry() as registry:
        row = registry.row(Ref("alice/tiny-lora"))
    assert (row.digest[7:47], row.number, row.base, row.r) == (oid, 1, "org/tiny", 2)


def test_trl_pushes_what_it_trained_without_its_pickles(hub: Running, tmp_path: Path) -> None:
    need_module("trl")
    assert json.loads(printed(hub, tmp_path, TRL, tmp_path / "out"))
    document = Sending(hub.url, hub.token).ask("GET", "/api/models/alice/sft").json()
    files = [sibling["rfilename"] for sibling in document["siblings"]]
    assert document["adapterhub"]["number"] >= 1
    assert "adapter_model.safetensors" in files
    assert not [file for file in files if file.endswith(".bin")]


LOADED = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(8)[None]
here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "sql")
expected = here(ids).logits
base = lambda: AutoModelForCausalLM.from_pretrained("org/base")
assert not torch.equal(base()(ids).logits, expected)
assert torch.equal(PeftModel.from_pretrained(base(), "org/sql", revision="prod")(ids).logits, expected)
assert torch.equal(AutoPeftModelForCausalLM.from_pretrained("org/sql", revision="prod")(ids).logits, expected)
plain = base()
plain.load_adapter("org/sql", adapter_kwargs={"revision": "prod"})
assert torch.equal(plain(ids).logits, expected)
print("same")
"""


def test_peft_and_transformers_load_what_we_pushed_to_another_hub(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    from tests.support import tiny

    base = tiny.model()
    base.save_pretrained(tmp_path / "base")
    tiny.adapter(base, tmp_path / "sql", base_model_name_or_path="org/base")
    config = tmp_path / "sql/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "org/base"}))
    monkeypatch.chdir(tmp_path)
    with Hub() as other_hub:
        theirs(UPLOAD.format(token=TOKEN, repo="org/base", folder="base"), other_hub, tmp_path)
        run(
            "push",
            "sql",
            "hf://org/sql@prod",
            env={"HF_ENDPOINT": other_hub.url, "HF_TOKEN": "", "HF_HOME": str(tmp_path / "hf")},
        )
        assert theirs(LOADED, other_hub, tmp_path).endswith("same\n")
