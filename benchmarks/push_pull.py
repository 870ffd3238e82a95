"""Push a gibibyte into the local registry and pull it, against `cp`, `sync` and `sha256sum` of the same bytes, in turn.

    python benchmarks/push_pull.py [--mib 1024] [--rounds 3] [--dir DIR]

Ours is `adapterhub push` and `adapterhub pull` as a user types them: the adapter is checked, copied, hashed, synced and
named, and on the way out copied, hashed and compared. Theirs is what a careful user types instead. Both end on the disk.
DIR is on a disk with room for four copies.
"""

from __future__ import annotations

from _bench import OURS, Bench, Program, digest, main
from _models import adapter_of

PEER = "cp, sync and sha256sum"
JOBS = {"push into the local registry": [PEER], "pull from the local registry": [PEER]}


def local(bench: Bench) -> None:
    push, pull = JOBS
    mib, adapter = bench.options.mib, bench.input_folder(adapter_of, bench.options.mib)
    registry, copy, out = (bench.scratch / name for name in ("registry", "copy", "out"))
    weights, env = adapter / "adapter_model.safetensors", {"ADAPTERHUB_REGISTRY": str(registry)}
    pushing = Program("adapterhub", [*OURS, "push", str(adapter), "team/big"], env=env)
    pulling = Program("adapterhub", [*OURS, "pull", "team/big", "-o", str(out)], env=env)
    theirs = Program(PEER, ["sh", "-c", 'cp "$0" "$1" && sync "$1" && sha256sum "$1"', str(weights), str(copy)])
    bench.add(push, f"{mib} MiB, checked, hashed, synced", bench.turns(pushing, theirs, fresh=[registry, copy]))
    turns = bench.turns(pulling, theirs, fresh=[out, copy])
    claims = {"pulled bytes are those pushed": digest(out / weights.name) == digest(weights)}
    bench.add(pull, f"{mib} MiB, every byte verified", turns, claims)


if __name__ == "__main__":
    main(__doc__, JOBS, local, mib=(1024, 2), rounds=(3, 1))
