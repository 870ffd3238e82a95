"""Push and pull of one adapter to a docker-registry on 127.0.0.1: ours beside oras and curl, whole processes in turn.

    python benchmarks/transfer.py [--mib 1024] [--runs 3]
    python benchmarks/transfer.py --hub [--runs 9]

All share the machine's cores with the server. A push finds an empty registry; a pull, an empty folder. curl's pull is
`curl | tee FILE | sha256sum`, the least that ends with a file whose digest is known. Memory: the most that a process had
resident; of ours also how much that is above the same with 1 MiB. `--hub` has a small adapter fetched from a hub, once more
where all of it is there already, into a new folder, and into the one that has it: ours beside `hf download`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas"), str(ROOT / "benchmarks")]

from _pairs import Run, compare, timed  # noqa: E402

from adapterhub_converters.containers import safetensors_file  # noqa: E402
from tests.remotes import registry  # noqa: E402


def make(folder: Path, mib: int) -> None:
    """A PEFT folder whose weights have so many MiB of random numbers."""
    folder.mkdir()
    layers, rows = 16, mib * (1 << 20) // 4 // 2 // 16 // 64
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{half}.weight": rng.random(
            (64, rows) if half == "A" else (rows, 64), np.float32
        )
        for n in range(layers)
        for half in "AB"
    }
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": ["q_proj"], "base_model_name_or_path": "a/b"}'
    )


def hub(runs: int) -> None:
    """Fetch a small adapter of which nothing has changed, from a hub in another process."""
    serve = (
        "import sys; from tests.remotes.hub_server import Hub\nwith Hub() as hub: print(hub.url, flush=True); sys.stdin.read()"
    )
    with tempfile.TemporaryDirectory(prefix="adapterhub-bench-") as temporary:
        root, env = Path(temporary), {"PYTHONPATH": ":".join(sys.path[:3])}
        make(root / "sql", 6)
        with subprocess.Popen(
            [sys.executable, "-c", serve], env={**os.environ, **env}, stdin=-1, stdout=-1, text=True
        ) as server:
            assert server.stdout is not None
            env |= {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HOME": str(root / "hf"), "HF_TOKEN": "hf_none"}
            env |= {"ADAPTERHUB_REGISTRY": str(root / "registry"), "HF_HUB_DISABLE_TELEMETRY": "1"}
            env["PYTHONDONTWRITEBYTECODE"] = ""  # as what is installed, ours is compiled once
            ours = [sys.executable, "-m", "adapterhub"]
            timed([*ours, "push", str(root / "sql"), "hf://org/sql"], env=env)
            here, theirs = [*ours, "copy", "hf://org/sql", "team/sql"], ["hf", "download", "org/sql"]
            for command in (here, theirs):
                timed(command, env=env)
            compare(here, theirs, runs, title="fetch again what is there, hf", env=env)
            again, theirs = [*ours, "pull", "hf://org/sql", "-o", str(root / "a")], [*theirs, "--local-dir", str(root / "b")]
            compare(again, theirs, runs, title="pull 6 MiB, hf", env=env, fresh=[root / "a", root / "b"])
            for command in (again, theirs):
                timed(command, env=env)
            compare(again, theirs, runs, title="pull 6 MiB into the folder that has them, hf", env=env)
            server.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hub", action="store_true")
    options = parser.parse_args()
    if options.hub:
        hub(options.runs)
        return
    if options.make:
        make(options.make, options.mib)
        return
    with tempfile.TemporaryDirectory(prefix="adapterhub-bench-") as temporary:
        root = Path(temporary)
        # In a process of its own: the peak of a child counts from what its parent had when it was forked.
        itself = [sys.executable, __file__, "--make", str(root / "sql"), "--mib", str(options.mib)]
        subprocess.run(itself, check=True)
        with registry.running(root) as host:
            measure(root, host, options.runs, options.mib)


def measure(root: Path, host: str, runs: int, mib: int) -> None:
    there, weights = f"{host}/bench", "adapter_model.safetensors"
    digest = digest_of(root / "sql" / weights)
    ours = ["env", f"PYTHONPATH={':'.join(sys.path[:3])}", f"XDG_DATA_HOME={root}/xdg", sys.executable, "-m", "adapterhub"]
    oras = ["env", "-C", str(root / "sql"), "oras", "push", "--plain-http", f"{there}/theirs:latest"]
    curl = f"curl -sf http://{there}/theirs/blobs/sha256:{digest} | tee {root}/c | sha256sum"
    make_tiny = [sys.executable, __file__, "--make", str(root / "tiny"), "--mib", "1"]
    subprocess.run(make_tiny, check=True)
    started = timed([*ours, "push", str(root / "tiny"), f"oci://{there}/tiny"]).bytes
    pushes = {
        "ours": [*ours, "push", str(root / "sql"), f"oci://{there}/ours"],
        "oras": [*oras, "adapter_config.json", weights],
    }
    pulls = {
        "ours": [*ours, "pull", f"oci://{there}/ours", "-o", str(root / "a")],
        "oras": ["oras", "pull", "--plain-http", f"{there}/theirs:latest", "-o", str(root / "b")],
        "curl": ["sh", "-c", curl.replace("/bench/theirs/", "/v2/bench/theirs/")],
    }
    show(f"push {mib} MiB", alternate(pushes, runs, [root / "data"]), started)
    again = {"ours": pushes["ours"], "oras": pushes["oras"]}
    show(f"push {mib} MiB that are there", alternate(again, runs, []), started)
    show(f"pull {mib} MiB", alternate(pulls, runs, [root / "a", root / "b", root / "c"]), started)


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def alternate(commands: Mapping[str, Sequence[str]], runs: int, fresh: Sequence[Path]) -> dict[str, Run]:
    """The medians of each command, in turn; one unmeasured round first. `fresh` is removed before each round."""
    rounds: list[dict[str, Run]] = []
    for _ in range(runs + 1):
        found = {}
        for name, command in commands.items():
            for path in fresh if name == next(iter(commands)) else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            found[name] = timed(command)
        rounds.append(found)
    del rounds[0]
    return {
        name: Run(
            statistics.median(found[name].seconds for found in rounds),
            int(statistics.median(found[name].bytes for found in rounds)),
        )
        for name in commands
    }


def show(title: str, found: Mapping[str, Run], started: int) -> None:
    print(f"{title}, medians")
    print(f"{'':8}{'seconds':>10}{'ratio':>8}{'peak MB':>10}{'above start':>13}")
    for name, run in found.items():
        ratio = run.seconds / found["ours"].seconds
        above = f"{(run.bytes - started) / 1e6:13.1f}" if name == "ours" else ""
        print(f"{name:8}{run.seconds:10.3f}{ratio:7.2f}x{run.bytes / 1e6:10.1f}{above}")


if __name__ == "__main__":
    main()
