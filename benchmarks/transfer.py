"""Transfer an adapter to and from a docker-registry and a hub on 127.0.0.1: ours, oras, curl and hf, whole processes in turn.

    python benchmarks/transfer.py [--only registry] [--mib 1024] [--rounds 3]
    python benchmarks/transfer.py --only hub --rounds 9

All share the cores of the machine with the server. A push finds an empty registry, a pull an empty folder. curl's pull is
`curl | tee FILE | sha256sum`, the least that ends with a file whose digest is known. The row of 2 MiB shows how much of
the peak memory does not depend on the size. `hub`: a small adapter is fetched again into the registry (for hf: the cache)
that has it, pulled into a new folder, and into the folder that has it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _bench import ENVIRONMENT, OURS, Bench, Program, digest, lacking, main, process, timed
from _models import adapter_of

ORAS_PUSH, ORAS_PULL, CURL, HF = "oras push", "oras pull", "curl | tee FILE | sha256sum", "hf download"
SMALL = "adapterhub, 2 MiB"
JOBS = {
    "push to a docker-registry": [ORAS_PUSH, SMALL],
    "push to a docker-registry what is there already": [ORAS_PUSH],
    "pull from a docker-registry": [ORAS_PULL, CURL, SMALL],
    "fetch from a hub into the registry what is there already": [HF],
    "pull from a hub": [HF],
    "pull from a hub what is there already": [HF],
}
HUB_MIB = 6


def registry(bench: Bench) -> None:
    push, push_again, pull, *_ = JOBS
    mib, scratch, weights = bench.options.mib, bench.scratch, "adapter_model.safetensors"
    adapter, small = bench.input_folder(adapter_of, mib), bench.input_folder(adapter_of, 2)
    size, sha256 = f"{mib} MiB", digest(adapter / weights)
    with serving(serve_registry, scratch) if not lacking(["docker-registry"]) else contextlib.nullcontext("") as host:

        def ours(name: str, *arguments: object) -> Program:
            command = [*OURS, *map(str, arguments)]
            return Program(name, command, ["docker-registry"], {"XDG_DATA_HOME": str(scratch / "xdg")})

        def oras(name: str, *arguments: object) -> Program:
            command = ["env", "-C", str(adapter), *name.split(), "--plain-http", *map(str, arguments)]
            return Program(name, command, ["docker-registry", "oras"])

        theirs = oras(ORAS_PUSH, f"{host}/bench/theirs:latest", "adapter_config.json", weights)
        pushed = ours("adapterhub", "push", adapter, f"oci://{host}/bench/ours")
        tiny = ours(SMALL, "push", small, f"oci://{host}/bench/small")
        bench.add(push, f"{size}, on the same cores", bench.turns(pushed, theirs, tiny, fresh=[scratch / "data"]))
        bench.add(push_again, size, bench.turns(pushed, theirs))
        places = a, b, c, d = [scratch / name for name in "abcd"]
        curl = f"curl -sf http://{host}/v2/bench/theirs/blobs/sha256:{sha256} | tee {c} | sha256sum"
        turns = bench.turns(
            ours("adapterhub", "pull", f"oci://{host}/bench/ours", "-o", a),
            oras(ORAS_PULL, f"{host}/bench/theirs:latest", "-o", b),
            Program(CURL, ["sh", "-c", curl], ["docker-registry", "oras", "curl"]),
            ours(SMALL, "pull", f"oci://{host}/bench/small", "-o", d),
            fresh=places,
        )
    pulled = [path for path in (a / weights, b / weights, c) if path.exists()]
    claims = {"pulled bytes are those pushed": all(digest(path) == sha256 for path in pulled)}
    bench.add(pull, f"{size}, flushed to the disk", turns, claims)


def hub(bench: Bench) -> None:
    *_, fetch, pull, pull_again = JOBS
    adapter, scratch, detail = bench.input_folder(adapter_of, HUB_MIB), bench.scratch, f"{HUB_MIB} MiB"
    with serving(serve_hub) as url:
        env = {"HF_ENDPOINT": url, "HF_HOME": str(scratch / "hf"), "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0"}
        env |= {"ADAPTERHUB_REGISTRY": str(scratch / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        timed([*OURS, "push", str(adapter), "hf://org/sql"], env)
        ours_program = Program("adapterhub", [*OURS, "copy", "hf://org/sql", "team/sql"], env=env)
        cached = Program(HF, ["hf", "download", "org/sql"], ["hf"], env)
        bench.turns(ours_program, cached)
        bench.add(fetch, detail, bench.turns(ours_program, cached))
        places = a, b = [scratch / name for name in ("hub-a", "hub-b")]
        ours = Program("adapterhub", [*OURS, "pull", "hf://org/sql", "-o", str(a)], env=env)
        theirs = Program(HF, ["hf", "download", "org/sql", "--local-dir", str(b)], ["hf"], env)
        turns = bench.turns(ours, theirs, fresh=places)
        pulled = [path for path in (place / "adapter_model.safetensors" for place in places) if path.exists()]
        claims = {"pulled bytes are those pushed": {*map(digest, pulled)} == {digest(adapter / "adapter_model.safetensors")}}
        bench.add(pull, detail, turns, claims)
        bench.add(pull_again, f"{detail}, into the same folder", bench.turns(ours, theirs))


@contextlib.contextmanager
def serving(function: Callable[..., None], *arguments: object) -> Iterator[str]:
    """Run a server, a function of this file, in a process of its own; the first line that it prints."""
    command, pipe = process(function, *arguments), subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.communicate()


def serve_registry(folder: str) -> None:
    from tests.support.registry import running

    _until_input_ends(running(Path(folder)))


def serve_hub() -> None:
    from tests.support.hub_server import Hub

    _until_input_ends(Hub())


def _until_input_ends(server: Any) -> None:
    with server as address:
        print(getattr(address, "url", address), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(__doc__, JOBS, registry, hub, mib=(1024, 2), rounds=(3, 1))
