"""Serve adapters from our hub, from a docker-registry and from nginx on 127.0.0.1, the same bytes in turn.

    python benchmarks/hub.py [--mib 1024] [--upload 20] [--requests 4000] [--rounds 3]
    python benchmarks/hub.py --only rates
    python benchmarks/hub.py --hostile [--smoke]
    python benchmarks/hub.py --only lists --names 1000000

All share the cores of the machine with their client, curl or hf as a whole process, or eight connections of one thread that ask
without a pause. `server` figures are of all processes of a server: CPU seconds for one transfer, and the peak memory since its
start. What is sent is new to the server each time. nginx sends a file as it is on the disk, and "Starlette alone" is one route
that answers `{}` under the same server as ours, so that nothing is asked or read.

`--hostile` measures instead what a client without an account, and a member with a quota, can take, next to the limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import _hostile
from _bench import OURS, Bench, Figures, Program, digest, main, process, timed
from _models import adapter_of
from transfer import serve_registry, serving

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.registry.registry import Registry
from tests.support.many_names import add_names

REGISTRY, NGINX, XET, ALONE = "docker-registry", "nginx", "adapterhub, by Xet", "Starlette alone"
JOBS = {
    "get a blob from a hub": [REGISTRY, NGINX],
    "put a blob to a hub": [REGISTRY],
    "hf upload to a hub, by LFS": [XET],
    "hf download from a hub what is there already": [],
    "ask a hub for the head of a file": [ALONE],
    "ask a hub about a model": [ALONE],
    "list the models of a hub": [],
    "list the names of a hub as OCI clients do": [],
    "list the tags of a hub": [],
    "show the search page of a hub": [],
    "show the administration page of a hub": [],
}
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds: as finely as the system counts
WEIGHTS, NAME = "adapter_model.safetensors", "team/sql"


def blobs(bench: Bench) -> None:
    get, put_job, *_ = JOBS
    mib, scratch = bench.options.mib, bench.scratch
    weights = bench.input_folder(adapter_of, mib) / WEIGHTS
    with contextlib.ExitStack() as stack:
        hub = json.loads(stack.enter_context(serving(serve_hub, pushed(weights.parent, scratch / "hub"))))
        programs = [program("adapterhub", fetch, f"{hub['url']}/{NAME}/resolve/main/{WEIGHTS}", hub["pid"])]
        putting = [program("adapterhub", put_by_lfs, hub["url"], hub["token"], weights, hub["pid"])]
        if shutil.which("docker-registry"):
            host = stack.enter_context(serving(serve_registry, make_folder(scratch / "registry")))
            pid = int(subprocess.run(["pgrep", "-n", "docker-registry"], check=True, capture_output=True).stdout)
            put_to_registry(host, str(weights), pid, unchanged=True)
            programs.append(program(REGISTRY, fetch, f"http://{host}/v2/bench/blobs/sha256:{digest(weights)}", pid))
            putting.append(program(REGISTRY, put_to_registry, host, weights, pid))
        else:
            programs.append(Program(REGISTRY, [], ["docker-registry"]))
            putting.append(Program(REGISTRY, [], ["docker-registry"]))
        if shutil.which("nginx"):
            nginx = json.loads(stack.enter_context(serving(serve_nginx, make_folder(scratch / "nginx"), weights.parent)))
            programs.append(program(NGINX, fetch, f"{nginx['url']}/{WEIGHTS}", nginx["pid"]))
        else:
            programs.append(Program(NGINX, [], ["nginx"]))
        bench.add(get, f"{mib} MiB, by curl", bench.turns(*programs))
        bench.add(put_job, f"{mib} MiB, hashed, by curl", bench.turns(*putting))


def clients(bench: Bench) -> None:
    _, _, upload, again, *_ = JOBS
    adapter, scratch = bench.input_folder(adapter_of, bench.options.upload), bench.scratch
    with serving(serve_hub, pushed(adapter, scratch / "hub-of-clients")) as line:
        hub = json.loads(line)
        env = {"HF_ENDPOINT": hub["url"], "HF_TOKEN": hub["token"], "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        homes = by_lfs, by_xet = [scratch / name for name in ("home-lfs", "home-xet")]
        command = ["sh", "-c", f'hf upload "team/new-$$-$(date +%s)" {adapter} .']
        lfs = Program("adapterhub", command, ["hf"], {**env, "HF_HOME": str(by_lfs), "HF_HUB_DISABLE_XET": "1"})
        xet = Program(XET, command, ["hf", "hf_xet"], {**env, "HF_HOME": str(by_xet)})
        detail = f"{bench.options.upload} MiB, all of the client"
        bench.add(upload, f"{detail}, first time", bench.turns(lfs, xet, fresh=homes))
        words = ["hf", "download", NAME, "--local-dir", str(scratch / "down")]
        downloading = Program("adapterhub", words, ["hf"], {**env, "HF_HOME": str(scratch / "home-down")})
        bench.turns(downloading)
        bench.add(again, detail, bench.turns(downloading))


def rates(bench: Bench) -> None:
    _, _, _, _, head, about, *_ = JOBS
    count, scratch = bench.options.requests, bench.scratch
    adapter = bench.input_folder(adapter_of, 2)
    with serving(serve_hub, pushed(adapter, scratch / "hub-of-rates")) as line, serving(serve_alone) as peer:
        hub, alone = json.loads(line), json.loads(peer)
        for job, method, path in ((head, "HEAD", f"/{NAME}/resolve/main/{WEIGHTS}"), (about, "GET", f"/api/models/{NAME}")):
            ours = program("adapterhub", rate, hub["url"], method, path, hub["token"], count)
            theirs = program(ALONE, rate, alone["url"], method, "/", "", count)
            bench.add(job, f"{count} requests with a token on 8 connections", bench.turns(ours, theirs))


def lists(bench: Bench) -> None:
    """Pages of lists at the beginning, in the middle and at the end, over names that are only in the index."""
    *_, models, catalog, tags, page, admin = JOBS
    names = bench.options.names
    with Registry.init(bench.scratch / "hub-of-names") as registry:
        add_names(registry.index.connection, names, private=3)
        sql = "SELECT time, name FROM versions ORDER BY time DESC, name DESC LIMIT 1 OFFSET ?"
        cursors = [f"{time} {name}" for at in (0, 2, 1.01) for time, name in registry.index.select(sql, int(at and names / at))]
        pulled = registry.index.select("SELECT name, id % 97 + 1 FROM versions WHERE id % 10 = 0")
    with contextlib.closing(HubDatabase(bench.scratch / "hub-of-names")) as database:
        sql = "INSERT INTO downloads (name, number, day, protocol, count) VALUES (?, 1, '9999-01-01', 'hf', ?)"
        database.execute_many(sql, pulled)
    with serving(serve_hub, bench.scratch / "hub-of-names") as line:
        hub = json.loads(line)
        paths = {
            (models, f"page of 100 of {names} names, {place}"): f"/api/models?limit=100&{urlencode({'cursor': cursor})}"
            for place, cursor in zip(("the first", "in the middle", "near the end"), cursors, strict=True)
        }
        paths |= {
            (models, "100 of a base"): "/api/models?limit=100&filter=base_model:org3/model-3",
            (models, "100 with a word"): "/api/models?limit=100&search=ba1",
            (models, "100 with a word that begins with b"): "/api/models?limit=100&search=b",
            (catalog, "1000, from the middle"): "/v2/_catalog?n=1000&last=team50/",
            (tags, "of all kinds"): "/api/models-tags-by-type",
            (page, "without a query"): "/",
            (page, "with a letter"): "/?q=b",
            (page, "with a letter and a license"): "/?q=b&license=mit",
            (page, "of a rank that all have"): "/?rank=8",
            (page, "by downloads"): "/?sort=downloads",
            (page, "by downloads, with a word"): "/?sort=downloads&q=ba1",
            (page, "by downloads, names without any"): f"/?{urlencode({'sort': 'downloads', 'cursor': cursors[1]})}",
        }
        paths |= {
            (page, f"the newest of {names} names, {place}"): f"/?{urlencode({'sort': 'newest', 'cursor': cursor})}"
            for place, cursor in zip(("the first", "in the middle", "near the end"), cursors, strict=True)
        }
        requests = [(job, detail, path, hub["token"]) for (job, detail), path in paths.items()]
        # A third of the names is private.
        requests += [(job, f"{detail}, to nobody", path, "") for (job, detail), path in paths.items() if job != catalog]
        requests.append((admin, "with what namespaces store", "/-/admin", hub["admin"]))
        for job, detail, path, token in requests:
            bench.add(job, detail, {"adapterhub": cost_of(f"{hub['url']}{path}", token, hub["pid"], bench.options.rounds)})


def cost_of(url: str, token: str, pid: int, rounds: int) -> Figures:
    """The CPU time of a server for one answer, of enough of them to be counted."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request, count = urllib.request.Request(url, headers=headers), 20 * rounds
    urllib.request.urlopen(request).read()
    before = cpu(pid)
    for _ in range(count):
        urllib.request.urlopen(request).read()
    return {"server CPU ms": since(pid, before) / count * 1000, "server MB": peak(pid)}


def pushed(adapter: Path, registry: Path) -> Path:
    """A registry that has an adapter."""
    timed([*OURS, "push", str(adapter), NAME], {"ADAPTERHUB_REGISTRY": str(registry)})
    return registry


def program(name: str, function: Any, *arguments: object) -> Program:
    return Program(name, process(function, *arguments), itself=True)


# ---- clients, each in a process of its own


def fetch(url: str, pid: int) -> Figures:
    """Get a file with curl."""
    before, start = cpu(pid), time.perf_counter()
    result = subprocess.run(["curl", "-sf", "-o", "/dev/null", "-w", "%{size_download}", url], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    return {"MB/s": int(result.stdout) / 1e6 / seconds, "server seconds": since(pid, before), "server MB": peak(pid)}


def put_by_lfs(url: str, token: str, weights: str, pid: int) -> Figures:
    """Upload a file that the hub has not seen, as git-lfs does."""
    path = Path(weights)
    renew(path)
    size = path.stat().st_size
    body = json.dumps({"operation": "upload", "objects": [{"oid": digest(path), "size": size}]}).encode()
    before, start = cpu(pid), time.perf_counter()
    request = urllib.request.Request(f"{url}/{NAME}.git/info/lfs/objects/batch", body, {"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        href = json.load(answer)["objects"][0]["actions"]["upload"]["href"]
    curl("-T", weights, href)
    return {"MB/s": size / 1e6 / (time.perf_counter() - start), "server seconds": since(pid, before), "server MB": peak(pid)}


def put_to_registry(host: str, weights: str, pid: int, *, unchanged: bool = False) -> Figures:
    """Upload a file in one piece, as the OCI distribution has it."""
    path = Path(weights)
    if not unchanged:
        renew(path)
    sha256, size = digest(path), path.stat().st_size
    before, start = cpu(pid), time.perf_counter()
    request = urllib.request.Request(f"http://{host}/v2/bench/blobs/uploads/", b"", method="POST")
    with urllib.request.urlopen(request) as answer:
        place = answer.headers["Location"]
    curl("-T", weights, f"{place}{'&' if '?' in place else '?'}digest=sha256:{sha256}")
    return {"MB/s": size / 1e6 / (time.perf_counter() - start), "server seconds": since(pid, before), "server MB": peak(pid)}


def curl(*words: str) -> None:
    subprocess.run(["curl", "-sf", "-H", "Expect:", *words], check=True, stdout=subprocess.DEVNULL)


def renew(path: Path) -> None:
    """Change the last bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(os.urandom(16))


def rate(url: str, method: str, path: str, token: str, count: int) -> Figures:
    """Ask `count` times on eight connections, on each as soon as the answer before has come."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = f"{method} {path} HTTP/1.1\r\nhost: {host}:{port}\r\n" + (f"authorization: Bearer {token}\r\n" if token else "")
    request, remaining, waiting = f"{head}\r\n".encode(), count, 8
    selector = selectors.DefaultSelector()
    for _ in range(waiting):
        sock = socket.create_connection((host, int(port)))
        selector.register(sock, selectors.EVENT_READ, (sock, length(sock, request, method)))
    start = time.perf_counter()
    for key in selector.get_map().values():
        key.data[0].send(request)
    while waiting:
        for key, _ in selector.select():
            sock, answer_size = key.data
            received = len(sock.recv(1 << 16))
            while received < answer_size:
                received += len(sock.recv(1 << 16))
            remaining -= 1
            if remaining >= waiting:
                sock.send(request)
            else:
                waiting -= 1
    return {"requests/s": count / (time.perf_counter() - start)}


def length(sock: socket.socket, request: bytes, method: str) -> int:
    """The bytes of one answer, which all others have too."""
    sock.send(request)
    answer = sock.recv(1 << 16)
    head, _, _ = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(head.decode())
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    size = len(head) + 4 + (0 if method == "HEAD" else int(lines[b"content-length"]))
    while len(answer) < size:
        answer += sock.recv(1 << 16)
    return size


# ---- servers, each in a process of its own


def serve_hub(folder: str) -> None:
    """Our hub over a registry."""
    from adapterhub.hub.accounts import access_tokens
    from adapterhub.hub.hub_database import HubDatabase
    from adapterhub.hub.server import serve
    from adapterhub.hub.settings import HubSettings

    root = Path(folder)
    with contextlib.closing(HubDatabase(root)) as database:
        token, admin = (access_tokens.create(database, "alice", role) for role in ("write", "admin"))
    with stopped_by_input():
        serve(HubSettings(registry=root, port=0), ready=lambda url: print_address(url, token, admin=admin))


def attack(folder: Path, *, smoke: bool) -> int:
    """Measure what hostile clients can take of a hub of its own; return the exit code."""
    from adapterhub.hub.accounts import access_tokens, accounts
    from adapterhub.hub.hub_database import HubDatabase
    from adapterhub.registry.registry import Registry

    Registry.init(folder).close()
    with contextlib.closing(HubDatabase(folder)) as database:
        accounts.set_namespace(database, accounts.Namespace("red", max_bytes=_hostile.QUOTA))
        token = access_tokens.create(database, "red", "write", namespaces=("red",))
    rows: list[_hostile.Row] = []
    for number, attack_hub in enumerate(_hostile.ATTACKS):
        with serving(serve_hub, folder) as line:
            hub = _hostile.Target(json.loads(line)["url"], token, json.loads(line)["pid"], folder)
            if not number:
                repository = json.dumps({"name": "open", "organization": "red", "type": "model"}).encode()
                hub.ask("POST", "/api/repos/create", repository, token)
            rows += attack_hub(hub, 10 if smoke else 1)
    return 0 if _hostile.show(rows) else 1


def serve_alone() -> None:
    """Starlette with one route, under uvicorn as the hub has it."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def answer(_: Any) -> JSONResponse:
        return JSONResponse({})

    app = Starlette(routes=[Route("/", answer)])
    with stopped_by_input(), socket.create_server(("127.0.0.1", 0)) as sock:
        print_address(f"http://127.0.0.1:{sock.getsockname()[1]}", "")
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[sock])


def serve_nginx(folder: str, files: str) -> None:
    """nginx over a folder of files."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = f"server {{ listen 127.0.0.1:{port}; root {Path(files).absolute()}; }}"
    places = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    config = f"user {os.environ.get('USER', 'root')}; worker_processes 1; daemon off; pid {folder}/pid; error_log {folder}/log;"
    config += f" events {{}} http {{ access_log off; sendfile on; tcp_nopush on; {places} {server} }}"
    Path(folder, "nginx.conf").write_text(config)
    with subprocess.Popen(["nginx", "-e", f"{folder}/log", "-c", f"{folder}/nginx.conf"]) as running:
        while running.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        print_address(f"http://127.0.0.1:{port}", "", running.pid)
        sys.stdin.read()
        running.terminate()


def print_address(url: str, token: str, pid: int = 0, *, admin: str = "") -> None:
    print(json.dumps({"url": url, "token": token, "pid": pid or os.getpid(), "admin": admin}), flush=True)


@contextlib.contextmanager
def stopped_by_input() -> Iterator[None]:
    """End what the block runs, a server that a signal stops, once nobody waits for this process any more."""

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        yield


def make_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


def cpu(pid: int) -> float:
    """CPU seconds of a process and its children since they started."""
    fields = [Path(f"/proc/{field}/stat").read_text().rpartition(")")[2].split() for field in family(pid)]
    return sum(int(field[11]) + int(field[12]) for field in fields) * TICK


def since(pid: int, before: float) -> float:
    """CPU seconds of a process and its children since they had used `before`; what is too short to be counted is one tick."""
    return max(cpu(pid) - before, TICK)


def peak(pid: int) -> float:
    """Peak memory of a process and its children in MB."""
    lines = [
        line for member in family(pid) for line in Path(f"/proc/{member}/status").read_text().splitlines() if "VmHWM" in line
    ]
    return sum(int(line.split()[1]) for line in lines) * 1024 / 1e6


if __name__ == "__main__":
    if "--hostile" in sys.argv:
        with tempfile.TemporaryDirectory() as scratch:
            sys.exit(attack(Path(scratch), smoke="--smoke" in sys.argv))
    main(
        __doc__,
        JOBS,
        blobs,
        clients,
        rates,
        lists,
        names=(10_000, 200),
        mib=(1024, 2),
        upload=(20, 2),
        requests=(4000, 80),
        rounds=(3, 1),
    )
