"""How the cost of each job grows: three sizes of it, the start-up of a command, and the same bytes without any program.

    python benchmarks/growth.py [--rounds 3] [--dir DIR]

An adapter grows by its rank, a base by its number of weights, a registry by its versions. `start-up` is `adapterhub --version`,
with which every command begins. The floor reads, hashes or writes as many bytes as the largest has to, and does nothing else.
On a busy machine, only CPU seconds mean something. docs/limits.md quotes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _bench import OURS, Bench, Program, main
from _models import adapter, adapter_of, base

START = "start-up"
COPIED, HASHED, READ = "cp and sync of the largest", "cp, sync and sha256sum of the largest", "cat of the largest header"
JOBS = {
    "convert PEFT to GGUF, by rank": ["rank 32", "rank 128", START, COPIED],
    "check on a base, by its weights": ["ten times the weights", "a hundred times the weights", START, READ],
    "merge into a base, by its weights": ["five times the weights", "twenty-five times the weights", START, COPIED],
    "push, by size": ["4 times the bytes", "16 times the bytes", START, HASHED],
    "pull, by size": ["4 times the bytes", "16 times the bytes", START, HASHED],
    "search a registry, by versions": ["ten times the versions", "a hundred times the versions", START],
    "push into a registry, by versions": ["ten times the versions", "a hundred times the versions", START],
}


def registry_of(folder: str, versions: int) -> None:
    """A registry with so many versions, and its index."""
    from registry import filled

    from adapterhub.registry.registry import Registry

    filled(folder, versions)
    registry, problems = Registry.open_with_new_index(Path(folder))
    registry.close()
    if problems:
        raise problems[0]


def _measure(bench: Bench, job: str, detail: str, *programs: Program, fresh: Sequence[Path] = ()) -> None:
    """The job at three sizes with the floor of the largest, and the start-up alone."""
    bench.add(job, detail, bench.turns(*programs, Program(START, [*OURS, "--version"]), fresh=fresh))


def _names(job: str) -> list[str]:
    return ["adapterhub", *JOBS[job][:2]]


def _copy(name: str, source: Path, out: Path, *, hashed: bool = False) -> Program:
    command = 'cp "$0" "$1" && sync "$1"' + (' && sha256sum "$1"' if hashed else "")
    return Program(name, ["sh", "-c", command, str(source), str(out)])


def converted(bench: Bench) -> None:
    job, model = "convert PEFT to GGUF, by rank", bench.options.model
    ranks = [8, 32, 128] if model != "tiny" else [2, 4, 8]
    adapters, config = (
        [bench.input_folder(adapter, model, rank) for rank in ranks],
        bench.input_folder(base, model, values=False),
    )
    outs = [bench.scratch / f"{rank}.gguf" for rank in ranks]
    command = [*OURS, "convert", "--to", "gguf", "--base", str(config)]
    ours = [
        Program(name, [*command, str(folder), str(out)]) for name, folder, out in zip(_names(job), adapters, outs, strict=True)
    ]
    weights, copy = adapters[-1] / "adapter_model.safetensors", bench.scratch / "copy"
    detail = f"{model}, rank {ranks[0]} and as listed; the largest has {weights.stat().st_size / 1e6:.0f} MB"
    _measure(bench, job, detail, *ours, _copy(COPIED, weights, copy), fresh=[*outs, copy])


def checked(bench: Bench) -> None:
    job = "check on a base, by its weights"
    models = ["0.66B", "Llama-3-8B", "Llama-3-70B"] if bench.options.model != "tiny" else ["tiny"] * 3
    ours = []
    for name, model in zip(_names(job), models, strict=True):
        lora_folder, config = bench.input_folder(adapter, model, 8, values=False), bench.input_folder(base, model, values=False)
        ours.append(Program(name, [*OURS, "validate", "--headers-only", str(lora_folder), "--base", str(config)]))
    files = sorted(map(str, bench.input_folder(base, models[-1], values=False).glob("*.safetensors")))
    head = Program(READ, ["sh", "-c", 'for file; do head -c 100000 "$file"; done > /dev/null', "sh", *files])
    _measure(bench, job, f"{', '.join(models)}; rank 8, headers alone", *ours, head)


def merged(bench: Bench) -> None:
    job = "merge into a base, by its weights"
    models = ["28M", "SmolLM2-135M", "0.66B"] if bench.options.model != "tiny" else ["tiny"] * 3
    ours, outs = [], []
    for number, (name, model) in enumerate(zip(_names(job), models, strict=True)):
        lora_folder, whole = bench.input_folder(adapter, model, 16), bench.input_folder(base, model)
        outs.append(bench.scratch / f"merged-{number}")
        ours.append(Program(name, [*OURS, "merge", str(lora_folder), "--into", str(whole), "-o", str(outs[-1])]))
    whole, copy = bench.input_folder(base, models[-1]), bench.scratch / "copied"
    floor = Program(COPIED, ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(whole), str(copy)])
    _measure(bench, job, f"{', '.join(models)} in bfloat16, rank 16", *ours, floor, fresh=[*outs, copy])


def moved(bench: Bench) -> None:
    sizes = [bench.options.mib * times for times in (1, 4, 16)]
    adapters = [bench.input_folder(adapter_of, size) for size in sizes]
    weights, copy = adapters[-1] / "adapter_model.safetensors", bench.scratch / "copy"
    registries, outs = ([bench.scratch / f"{kind}-{size}" for size in sizes] for kind in ("registry", "out"))
    push, pull = "push, by size", "pull, by size"
    floor = _copy(HASHED, weights, copy, hashed=True)
    detail = f"{', '.join(map(str, sizes))} MiB; checked, hashed, synced"
    pushes, pulls = [], []
    for index, name in enumerate(_names(push)):
        env = {"ADAPTERHUB_REGISTRY": str(registries[index])}
        pushes.append(Program(name, [*OURS, "push", str(adapters[index]), "team/big"], env=env))
        pulls.append(Program(name, [*OURS, "pull", "team/big", "-o", str(outs[index])], env=env))
    _measure(bench, push, detail, *pushes, floor, fresh=[*registries, copy])
    _measure(bench, pull, detail, *pulls, floor, fresh=[*outs, copy])


def registered(bench: Bench) -> None:
    counts = [bench.options.versions * times for times in (1, 10, 100)]
    registries, new_adapter = (
        [bench.input_folder(registry_of, count) for count in counts],
        bench.input_folder(adapter, "tiny", 2),
    )
    detail = f"{', '.join(f'{count:,}' for count in counts)} versions"
    for job, words in (
        ("search a registry, by versions", ["search", "er", "--json"]),
        ("push into a registry, by versions", ["push", str(new_adapter), "other/new", "--json"]),
    ):
        ours = [[*OURS, "--registry", str(root), *words] for root in registries]
        _measure(bench, job, detail, *(Program(name, command) for name, command in zip(_names(job), ours, strict=True)))


if __name__ == "__main__":
    sizes = {"model": ("SmolLM2-135M", "tiny"), "mib": (16, 2), "versions": (100, 5), "rounds": (3, 1)}
    main(__doc__, JOBS, converted, checked, merged, moved, registered, **sizes)
