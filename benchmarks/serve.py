"""Many adapters on one base, ours against peft: what a batch, a slot, a switch and an adapter in memory cost.

    python benchmarks/serve.py [--base SmolLM2-135M|1.1B] [--steps 16] [--rounds 3] [--threads 1] [--rank 16]
        [--dtype bfloat16]

SmolLM2-135M and 1.1B (TinyLlama's shape) are random weights in bfloat16 that this script makes, as are the adapters, on all
linear layers. A step adds a token to each of eight answers; the base alone, eight adapters and one for all take turns in one
process, and the medians of their CPU time count. peft is its model with `adapter_names` for eight adapters, `load_adapter` to
fill, `set_adapter` to switch. Both compute in `--dtype`. The adapter that is filled has 50 MB in float32. What peft has no
counterpart to, a bound on the adapters that are active at the same time, is compared with a host that needs none.

Servers answer eight requests of `--steps` tokens at once, all by the base and each by an adapter of its own, in turn, and the
medians of the wall time count: the reference host, vLLM's build for CPUs, and one llama-server with all adapters. These two are
installed in environments of their own, and missing where they cannot be.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _bench import Bench, Figures, Program, main, process
from _models import COMMON, MODELS, adapter, base, linear
from train import with_tokenizer

BATCH, FILL, SWITCH, SLOTS, RESIDENT, SERVERS = (
    "step with eight adapters in a batch", "fill a slot", "switch to another adapter", "more adapters than slots",
    "adapters in memory", "eight requests at once",
)  # fmt: skip
VLLM, LLAMA = "vLLM on a CPU", "llama-server"
NAMES, LOAD, SET = "peft with `adapter_names`", "peft's `load_adapter`", "peft's `set_adapter`"
JOBS = {BATCH: [NAMES], FILL: [LOAD], SWITCH: [SET], SLOTS: [], RESIDENT: [LOAD], SERVERS: [VLLM, LLAMA]}
FILLED = 50e6  # bytes of the adapter that is filled
CONTEXT = 32  # tokens that each answer has before the steps


def measured(bench: Bench, job: str, detail: str, ours: Callable[..., Figures], **peers: Callable[..., Figures]) -> None:
    """Run ours and the peer in turn; each measures itself."""
    options = bench.options
    option_values = {
        **vars(options),
        "base": bench.input_folder(with_tokenizer, options.base),
        "plain": bench.input_folder(adapter, options.base, options.rank),
        "large": bench.input_folder(adapter, options.base, rank_of(FILLED, options.base), dtype="F32"),
    }
    needs = ["torch", "transformers"]
    programs = [Program("adapterhub", process(ours, option_values), needs, itself=True)]
    programs += [Program(name, process(peer, option_values), [*needs, "peft"], itself=True) for name, peer in peers.items()]
    bench.add(job, f"{options.base}, {detail}, threads: {options.threads}", bench.turns(*programs))


def rank_of(size: float, model: str) -> int:
    """The rank of an adapter of so many bytes in float32."""
    config = COMMON | MODELS[model]
    features = sum(map(sum, linear(config).values())) * config["num_hidden_layers"]
    return max(2, round(size / 4 / features)) if features > 1e5 else 2


def batch(bench: Bench) -> None:
    measured(bench, BATCH, f"r = {bench.options.rank}, {bench.options.dtype}", own_batch, **{NAMES: peft_batch})


def fill(bench: Bench) -> None:
    measured(bench, FILL, "50 MB in float32", own_fill, **{LOAD: peft_fill})


def switch(bench: Bench) -> None:
    measured(bench, SWITCH, f"r = {bench.options.rank}", own_switch, **{SET: peft_switch})


def slots(bench: Bench) -> None:
    measured(bench, SLOTS, f"r = {bench.options.rank}, {bench.options.slots} slots", own_slots)


def resident(bench: Bench) -> None:
    measured(bench, RESIDENT, f"{bench.options.adapters} of r = {bench.options.rank}", own_resident, **{LOAD: peft_resident})


def servers(bench: Bench) -> None:
    options = bench.options
    folder = bench.input_folder(servable, options.base, options.rank)
    option_values = {**vars(options), "folder": folder}
    peers = [(VLLM, vllm_server, "vllm"), (LLAMA, llama_server, "llama_server")]
    programs = [Program("adapterhub", process(own_server, option_values), ["torch", "transformers"], itself=True)]
    programs += [Program(name, process(peer, option_values), needed(support), itself=True) for name, peer, support in peers]
    detail = f"r = {options.rank}, {options.steps} tokens"
    bench.add(SERVERS, f"{options.base}, {detail}, threads: {options.threads}", bench.turns(*programs))


def needed(support: str) -> list[str]:
    """What a server lacks; nothing once it is installed."""
    import importlib

    import pytest

    module = importlib.import_module(f"tests.support.{support}")
    try:
        module.python() if support == "vllm" else module.program()
    except (pytest.skip.Exception, pytest.fail.Exception):
        return [f"{support} in an environment of its own"]
    return []


def servable(folder: str, model: str, rank: int) -> None:
    """A base that has a tokenizer and an adapter of it, each as a folder and as GGUF."""
    import adapterhub as ah
    from tests.support import serving

    place = Path(folder)
    for name in ("base", "adapter"):
        (place / name).mkdir()
    base(str(place / "base"), model)
    letters = [*serving.SPECIAL, *map(chr, range(33, 127)), "Ġ", "Ċ", "th"]
    padding_count = (COMMON | MODELS[model])["vocab_size"] - len(letters)
    serving.write_tokenizer(place / "base", [*letters, *(f"th{number}" for number in range(padding_count))], [("t", "h")])
    adapter(str(place / "adapter"), model, rank)
    ah.convert_model(place / "base", place / "base.gguf", to="gguf")
    ah.convert(place / "adapter", place / "adapter.gguf", to="gguf", base=place / "base.gguf")


def rates(answer: Callable[[int, int | None], int]) -> Figures:
    """The tokens in a second that eight requests at once get, all of the base and each of an adapter, in turn.

    `answer` is called with the number of a request and that of its adapter, and returns how many tokens it got.
    """
    rates_by_kind: dict[str, list[float]] = {"base": [], "eight": []}
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for kind, rate in rates_by_kind.items():
                started = time.perf_counter()
                tokens = sum(
                    pool.map(lambda row, with_adapter=kind == "eight": answer(row, row if with_adapter else None), range(8))
                )
                rate.append(tokens / (time.perf_counter() - started))
    base_rate, eight = (statistics.median(rate[1:]) for rate in rates_by_kind.values())
    return {"eight tokens/s": eight, "base tokens/s": base_rate, "eight of base %": 100 * eight / base_rate}


def prompt_of(row: int) -> list[int]:
    """Tokens with which no other request begins."""
    return [10 + row, *range(20, 20 + CONTEXT)]


def own_server(option_values: dict[str, Any]) -> Figures:
    import torch

    from adapterhub.serve.torch_engine import Request, open_host

    options = Namespace(**option_values)
    torch.set_num_threads(options.threads)
    folder = Path(options.folder)
    with open_host(folder / "base", slots=8, rows=8, prefixes=0) as host:
        for number in range(8):
            host.load(str(number), folder / "adapter")
        goes_on = tuple((token, -100.0) for token in host.text.ends)

        def answer(row: int, number: int | None) -> int:
            blend = () if number is None else ((str(number), 1.0),)
            return len(list(host.submit(Request(prompt_of(row), blend, options.steps, bias=goes_on))))

        return rates(answer)


def vllm_server(option_values: dict[str, Any]) -> Figures:
    from tests.support import vllm

    options = Namespace(**option_values)
    folder = Path(options.folder)
    lora = [f"a{number}={folder / 'adapter'}" for number in range(8)]
    words = ("--dtype", "bfloat16", "--max-num-seqs", 8, "--max-loras", 8, "--max-cpu-loras", 8, "--no-enable-prefix-caching")
    words += ("--max-lora-rank", max(8, options.rank), "--max-model-len", CONTEXT + 1 + options.steps, "--lora-modules", *lora)
    with (
        tempfile.TemporaryDirectory() as room,
        vllm.serving(folder / "base", Path(room), *words, env={"OMP_NUM_THREADS": str(options.threads)}) as server,
    ):

        def answer(row: int, number: int | None) -> int:
            name = "base" if number is None else f"a{number}"
            return len(server.generated(name, prompt_of(row), options.steps))

        return rates(answer)


def llama_server(option_values: dict[str, Any]) -> Figures:
    from tests.support import llama_server as program

    options = Namespace(**option_values)
    folder = Path(options.folder)
    files = ",".join([str(folder / "adapter.gguf")] * 8)
    words = ("--lora", files, "-np", 8, "--cache-ram", 0, "-t", options.threads)
    with program.alone(folder / "base.gguf", *words) as url:

        def answer(row: int, number: int | None) -> int:
            listed = [{"id": adapter_id, "scale": float(adapter_id == number)} for adapter_id in range(8)]
            completion = {"prompt": prompt_of(row), "max_tokens": options.steps, "temperature": 0, "ignore_eos": True}
            body = json.dumps({**completion, "lora": listed, "cache_prompt": False}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=240) as response:
                return int(json.load(response)["usage"]["completion_tokens"])

        return rates(answer)


def took(work: Callable[[], object]) -> float:
    """Milliseconds of processor time, which a busy machine disturbs least."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def in_turn(count: int, **kinds: Callable[[], object]) -> Figures:
    """The median milliseconds of each kind of work, the first kind last; and in percent of those of the first kind.

    The first time of each is not counted.
    """
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(count + 1):
        for kind, work in kinds.items():
            times[kind].append(took(work))
    medians = {kind: statistics.median(samples[1:]) for kind, samples in times.items()}
    first, *later_kinds = medians
    figures = {f"{kind} ms": medians[kind] for kind in (*later_kinds, first)}
    return figures | {f"{kind} of base %": 100 * medians[kind] / medians[first] for kind in later_kinds}


# ---- Ours


def own_model(options: Namespace, slots: int) -> Any:
    import torch

    from adapterhub.serve.torch_engine import model

    torch.set_num_threads(options.threads)
    return model.load(Path(options.base), slots=slots, rows=8, dtype=options.dtype)


def own_batch(option_values: dict[str, Any]) -> Figures:
    from adapterhub.serve.torch_engine.loaded_adapters import read
    from adapterhub.serve.torch_engine.model import Span
    from adapterhub.serve.torch_engine.segment_attention import KeysValues

    options = Namespace(**option_values)
    model = own_model(options, 8)
    for slot in range(8):
        model.slots.fill(slot, *read(Path(options.plain), model, rank=256))
    rows = []
    for row in range(8):
        keys_values = KeysValues(CONTEXT + 1)
        model.run([Span([3 + row + at for at in range(CONTEXT)], keys_values, 0, ())])
        rows.append(keys_values)

    def step(uses: list[Any]) -> Callable[[], object]:
        return lambda: model.run([Span([9], row, CONTEXT, use) for row, use in zip(rows, uses, strict=True)])

    distinct, same = [((row, 1.0),) for row in range(8)], [((0, 1.0),)] * 8
    return in_turn(options.steps, base=step([()] * 8), eight=step(distinct), one=step(same))


def own_fill(option_values: dict[str, Any]) -> Figures:
    from adapterhub.serve.torch_engine.loaded_adapters import read

    options = Namespace(**option_values)
    model = own_model(options, 8)
    factors: list[Any] = []
    times = in_turn(
        options.steps,
        load=lambda: factors.append(read(Path(options.large), model, rank=256)),
        slot=lambda: model.slots.fill(1, *factors.pop()),
    )
    return {"seconds": (times["load ms"] + times["slot ms"]) / 1000, "slot ms": times["slot ms"]}


def own_switch(option_values: dict[str, Any]) -> Figures:
    from adapterhub.serve.torch_engine.loaded_adapters import LoadedAdapter, read
    from adapterhub.serve.torch_engine.schedule import SlotTable

    options = Namespace(**option_values)
    model = own_model(options, 8)
    two = [LoadedAdapter(name, *read(Path(options.plain), model, rank=256)) for name in "ab"]
    table = SlotTable(8, lambda slot, entry: model.slots.fill(slot, entry.factors))
    turn = 0

    def switched() -> None:
        nonlocal turn
        turn = 1 - turn
        parts = ((two[turn], 1.0),)
        use = table.pin(parts)
        with model.slots.using([use], 1):
            pass
        table.unpin(parts)

    return {"ms": in_turn(100, switched=switched)["switched ms"]}


def own_slots(option_values: dict[str, Any]) -> Figures:
    """A load of which few adapters have the most requests (Zipf), by as many adapters as there are slots, and by one more."""
    import numpy as np
    import torch

    from adapterhub.serve.torch_engine import Request, open_host

    options = Namespace(**option_values)
    torch.set_num_threads(options.threads)
    rates: dict[int, list[float]] = {options.slots: [], options.slots + 1: []}
    with open_host(Path(options.base), slots=options.slots, rows=options.slots, prefixes=0) as host:
        for number in range(options.slots + 1):
            host.load(str(number), Path(options.plain))
        for _ in range(3):
            for count, rate in rates.items():
                shares = 1 / np.arange(1, count + 1)
                chosen = np.random.default_rng(0).choice(count, 2 * options.slots, p=shares / shares.sum())
                started = time.process_time()
                streams = [host.submit(Request([5, 6, 7], ((str(number), 1.0),), options.steps)) for number in chosen]
                tokens = sum(1 for stream in streams for _ in stream)
                rate.append(tokens / (time.process_time() - started))
    fitting_rate, overfull_rate = (statistics.median(rate) for rate in rates.values())
    return {"all fit tokens/s": fitting_rate, "one more tokens/s": overfull_rate, "rate %": 100 * overfull_rate / fitting_rate}


def own_resident(option_values: dict[str, Any]) -> Figures:
    from adapterhub.serve.torch_engine.loaded_adapters import Adapters

    options = Namespace(**option_values)
    model = own_model(options, 1)
    adapters = Adapters(model, max_bytes=1 << 40, rank=256)
    with grown(options) as figures:
        for number in range(options.adapters):
            adapters.load(str(number), Path(options.plain))
    return figures


@contextmanager
def grown(options: Namespace) -> Iterator[Figures]:
    """The memory that a block takes, and that in percent of the bytes of its adapters."""
    import torch

    from adapterhub.training import compute_device

    figures: Figures = {}
    before = compute_device.allocated_memory(torch.device("cpu"))
    yield figures
    size = compute_device.allocated_memory(torch.device("cpu")) - before
    weights = (Path(options.plain) / "adapter_model.safetensors").stat().st_size
    figures |= {"grown MB": size / 1e6, "of their bytes %": 100 * size / (options.adapters * weights)}


# ---- peft


def peft_model(options: Namespace, count: int) -> Any:
    import peft
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
    adapted_model = peft.PeftModel.from_pretrained(model, options.plain, adapter_name="a0", autocast_adapter_dtype=False)
    for number in range(1, count):
        adapted_model.load_adapter(options.plain, f"a{number}", autocast_adapter_dtype=False)
    return adapted_model.eval()


def peft_batch(option_values: dict[str, Any]) -> Figures:
    import torch

    options = Namespace(**option_values)
    model = peft_model(options, 8)
    ids = torch.arange(8)[:, None] + 3 + torch.arange(CONTEXT)

    def step(names: list[str]) -> Callable[[], object]:
        cache = model(ids, use_cache=True, adapter_names=names).cache

        def run() -> None:
            model(torch.full((8, 1), 9), cache=cache, use_cache=True, adapter_names=names)
            cache.crop(-1)

        return run

    kinds = {"base": ["__base__"] * 8, "eight": [f"a{row}" for row in range(8)], "one": ["a0"] * 8}
    with torch.inference_mode():
        return in_turn(options.steps, **{kind: step(names) for kind, names in kinds.items()})


def peft_fill(option_values: dict[str, Any]) -> Figures:
    options = Namespace(**option_values)
    model = peft_model(options, 1)
    times = []
    for _ in range(options.steps + 1):
        times.append(took(lambda: model.load_adapter(options.large, "large", autocast_adapter_dtype=False)))
        model.delete_adapter("large")
    return {"seconds": statistics.median(times[1:]) / 1000}


def peft_switch(option_values: dict[str, Any]) -> Figures:
    options = Namespace(**option_values)
    model = peft_model(options, 2)
    names = ["a0", "a1"]

    def switched() -> None:
        names.reverse()
        model.set_adapter(names[0])

    return {"ms": in_turn(100, switched=switched)["switched ms"]}


def peft_resident(option_values: dict[str, Any]) -> Figures:
    options = Namespace(**option_values)
    model = peft_model(options, 1)
    with grown(options) as figures:
        for number in range(options.adapters):
            model.load_adapter(options.plain, f"b{number}", autocast_adapter_dtype=False)
    return figures


if __name__ == "__main__":
    sizes: dict[str, tuple[Any, Any]] = {"base": ("SmolLM2-135M", "tiny"), "steps": (16, 3), "rounds": (3, 1), "rank": (16, 2)}
    sizes["dtype"] = ("bfloat16", "float32")
    main(__doc__, JOBS, batch, fill, switch, slots, resident, servers, **sizes, slots=(32, 3), adapters=(50, 4), threads=(1, 1))
