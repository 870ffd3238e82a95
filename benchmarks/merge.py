"""`fuse` against peft's `merge_and_unload` + `save_pretrained`, each as a whole process on the same base and adapter.

    python benchmarks/merge.py [--hidden 2048 --layers 22] [--runs 3] [--dir DIR]

The base is a random Llama in bfloat16 in shards of 1 GB, the adapter r = 16 on every linear layer; both are made once
in DIR. The two outputs are compared element by element at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _pairs import compare, timed

ROOT = Path(__file__).parent.parent

MAKE = """
import sys, torch, peft
from transformers import LlamaConfig, LlamaForCausalLM
folder, hidden, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
config = LlamaConfig(vocab_size=32000, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
                     num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 512), tie_word_embeddings=False)
model = LlamaForCausalLM(config)
model.save_pretrained(folder + "/base", max_shard_size="1GB")
model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data = torch.randn(parameter.shape, dtype=torch.float32) * 0.02
model.save_pretrained(folder + "/adapter")
"""

THEIRS = """
import sys, torch, peft
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
"""

OURS = """
import sys
from pathlib import Path
from adapterhub.merge import fuse
from adapterhub_converters import peft
base, adapter, out = map(Path, sys.argv[1:])
fuse([(peft.read(adapter), 1.0)], base, out)
"""


def differing(ours: Path, theirs: Path) -> tuple[int, int]:
    """Elements whose bits differ, and elements in all."""
    import numpy as np

    from adapterhub_converters.base import weight_files
    from adapterhub_converters.files.safetensors_file import SafetensorsFile

    where = {}
    for path in weight_files(theirs):
        with SafetensorsFile(path) as file:
            where |= dict.fromkeys(file.tensors, path)
    differ = total = 0
    for path in weight_files(ours):
        with SafetensorsFile(path) as file:
            for name in file.tensors:
                with SafetensorsFile(where[name]) as other:
                    one, two = file.tensor(name).view(np.uint16), other.tensor(name).view(np.uint16)
                differ += int(np.count_nonzero(one != two))
                total += one.size
    return differ, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "adapterhub-bench-merge")
    options = parser.parse_args()
    folder = options.dir / f"{options.hidden}x{options.layers}"
    if not (folder / "adapter").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", MAKE, folder, str(options.hidden), str(options.layers)], check=True)
    base, adapter = str(folder / "base"), str(folder / "adapter")
    outs = [folder / "ours", folder / "theirs"]
    ours = [sys.executable, "-c", OURS, base, adapter, str(outs[0])]
    theirs = [sys.executable, "-c", THEIRS, base, adapter, str(outs[1])]
    env = {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "converters", "schemas"))}
    title = "merge r = 16 on all linear layers into a bfloat16 Llama"
    compare(ours, theirs, runs=options.runs, title=title, env=env, fresh=outs)
    shutil.rmtree(outs[0], ignore_errors=True)
    timed(ours, env=env)  # removed before peft's last run
    differ, total = differing(*outs)
    print(f"{differ} of {total:,} elements differ from peft's")
    for out in outs:
        shutil.rmtree(out)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "converters")]
    main()
