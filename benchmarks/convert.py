"""Convert PEFT to GGUF: ours against llama.cpp's own `convert_lora_to_gguf.py`, whole processes in turn.

    python benchmarks/convert.py [--model Llama-3-8B] [--rank 16] [--rounds 5]

The adapter has random factors in bfloat16 on every linear module of a model of the shape of SmolLM2-135M or Llama 3 8B
(84 MB). Ours is `adapterhub convert` as a user types it. llama.cpp's scripts come from the source distribution of
`llama-cpp-python` on PyPI: `python -m tests.support.llama_cpp_scripts` downloads them once (77 MB, nothing is compiled). The
tensors of both files must be equal. The floor is `cp` and `sync` of the same bytes; an adapter of a single layer shows
how much of ours is start-up.
"""

from __future__ import annotations

from _bench import OURS, Bench, Program, call, main
from _models import adapter, base

from tests.support import llama_cpp_scripts

JOBS = {"convert PEFT to GGUF": ["llama.cpp's convert_lora_to_gguf.py", "cp and sync", "adapterhub, one layer"]}


def convert(bench: Bench) -> None:
    [(job, (llama_cpp, cp, start))] = JOBS.items()
    model, rank, scripts = bench.options.model, bench.options.rank, llama_cpp_scripts.scripts_folder()
    whole, config = bench.input_folder(adapter, model, rank), bench.input_folder(base, model, values=False)
    small, weights = bench.input_folder(adapter, model, rank, layers=1), whole / "adapter_model.safetensors"
    ours, theirs, copy, one_layer = outputs = [
        bench.scratch / name for name in ("ours.gguf", "theirs.gguf", "copy", "one.gguf")
    ]
    command = [*OURS, "convert", "--to", "gguf", "--base", str(config)]
    their_script = str(scripts / "convert_lora_to_gguf.py") if scripts else ""
    options = ["--base", str(config), "--outtype", "bf16", "--outfile", str(theirs)]
    needs = ["torch", "transformers", *(() if scripts else ["llama.cpp's scripts (python -m tests.support.llama_cpp_scripts)"])]
    turns = bench.turns(
        Program("adapterhub", [*command, str(whole), str(ours)]),
        Program(llama_cpp, [OURS[0], their_script, *options, str(whole)], needs),
        Program(cp, ["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(weights), str(copy)]),
        Program(start, [*command, "--force", str(small), str(one_layer)]),  # it ends at a lower layer than the base
        fresh=outputs,
    )
    detail = f"{model}, all linear layers, r = {rank}, {weights.stat().st_size / 1e6:.1f} MB of bfloat16"
    bench.add(job, detail, turns, {"the tensors of both files are equal": call(equal, ours, theirs)} if theirs.exists() else {})


def equal(ours: str, theirs: str) -> bool:
    """Compare the tensors, as bytes, and alpha."""
    from gguf import GGUFReader

    files = [GGUFReader(path) for path in (ours, theirs)]
    first, second = ({tensor.name: tensor.data.tobytes() for tensor in file.tensors} for file in files)
    alphas = {float(file.fields["adapter.lora.alpha"].contents()) for file in files}
    return bool(first) and first == second and len(alphas) == 1


if __name__ == "__main__":
    main(__doc__, JOBS, convert, model=("SmolLM2-135M", "tiny"), rank=(16, 4), rounds=(5, 1))
