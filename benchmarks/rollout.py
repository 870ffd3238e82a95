"""Roll a candidate out: how often the rules err, how many requests they take, and what they add to an answer.

    python benchmarks/rollout.py [--seeds 200] [--requests 400] [--rounds 3]

A rollout is simulated with the rules and the evidence of the gateway: requests are drawn to both arms, of which the stable one
fails in 10 % and the candidate in so many points more, and the state is looked at after every 20 requests. `requests` and
`pairs` are medians until the right end, `% wrong` are the rollouts that ended in the wrong way, and `pairs planned` is what the
rules say a drop needs. Beside it is the sign test of as many pairs as find the drop in nine of ten cases: it has to know how
often requests fail before it begins, and is looked at once. Then one gateway over an engine that costs nothing answers through
a route with a rollout and a shadow, one with a rollout alone, and one without either, in turn.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from _bench import HERE, Bench, Figures, Program, call, main, process

PLAIN, ALONE = "a route without a rollout", "a route with a rollout, without a shadow"
FIXED_SIZE = "a sign test of fixed size, looked at once"
SIMULATION, ADDED = "requests until a simulated rollout ends", "answer through a route"
JOBS: dict[str, list[str]] = {SIMULATION: [FIXED_SIZE], ADDED: [PLAIN, ALONE]}
FAILURES = 0.1  # of the stable arm
SHARES = (40, 60)  # percent, of the candidate at each step
DROPS = (2.0, 5.0, 20.0)  # points
ERROR, POWER = 0.01, 0.9  # of a false rollback; to find the drop that the bound names
MOST_REQUESTS = 400_000
LOOK_INTERVAL = 20  # requests between two looks at the state


def simulations(bench: Bench) -> None:
    """Simulate candidates that are no worse, and some that are worse by the drop that the bound names."""
    seeds = bench.options.seeds
    for drop in DROPS:
        for is_worse in (False, True):
            rules = Program("adapterhub", process(simulate, drop, seeds, is_worse=is_worse), itself=True)
            fixed_size = Program(FIXED_SIZE, process(simulate_fixed_size, drop, seeds, is_worse=is_worse), itself=True)
            figures = {program.name: program.run() for program in (rules, fixed_size)}
            kind = f"worse by {drop:g} points" if is_worse else f"no worse, for a drop of {drop:g} points"
            limit = (1 - POWER if is_worse else ERROR) * 100 + 300 / seeds  # percent; a few seeds say little
            claims = {"errors as stated": figures["adapterhub"]["% wrong"] <= limit}
            bench.add(SIMULATION, kind, figures, claims)


def simulate(drop: float, seeds: int, *, is_worse: bool) -> Figures:
    """Run rollouts; return the pairs and requests that the right verdict took, and the share that ended in the wrong way."""
    from adapterhub.evidence import rollout_rules
    from adapterhub.manifest.rollout_state import ROLLED_BACK

    pairs, requests, wrong, planned = [], [], 0, 0
    for seed in range(seeds):
        state, count = rollout(seed, drop, FAILURES + drop / 100 * is_worse)
        [verdict] = rollout_rules.verdicts(state)
        planned = verdict.needed
        if (state.state == ROLLED_BACK) == is_worse:
            pairs.append(verdict.pairs)
            requests.append(count)
        else:
            wrong += 1
    return figures_of(pairs, requests, wrong / seeds, planned)


def figures_of(pairs: list[int], requests: list[int], wrong: float, planned: float) -> Figures:
    """Return the columns of a simulation."""
    return {
        "requests": float(statistics.median(requests or [1])),
        "pairs": float(statistics.median(pairs or [1])),
        "% wrong": max(wrong * 100, 0.01),  # a hundredth of a point instead of none: figures of benchmarks are above 0
        "pairs planned": float(planned),
    }


def rollout(seed: int, drop: float, failures: float) -> tuple[Any, int]:
    """Return the last state of a rollout of two steps, whose candidate fails so often, and how many requests it took."""
    from adapterhub.evidence import rollout_rules
    from adapterhub.manifest.rollout_state import RUNNING, RolloutState, RolloutStep
    from adapterhub.serve.gateway.rollout_evidence import AnswerOutcome, Evidence

    rng = random.Random(seed)
    steps = tuple(RolloutStep(share, 1) for share in SHARES)
    state = RolloutState("legal", "team/legal@sha256:0", steps, {"errors": drop}, ERROR)
    evidence, outcomes = Evidence(state.bounds), (AnswerOutcome(), AnswerOutcome(failed=True))
    for number in range(1, MOST_REQUESTS + 1):
        is_candidate = rng.random() * 100 < state.share
        trial = evidence.admit("", "", str(number), is_candidate=is_candidate)
        assert trial is not None
        evidence.finish(trial, outcomes[rng.random() < (failures if is_candidate else FAILURES)])
        if number % LOOK_INTERVAL == 0:
            new_counts, evidence.counts = evidence.counts, {}
            state = rollout_rules.next_state(rollout_rules.with_evidence(state, state.seconds + 1, new_counts))
            if state.state != RUNNING:
                break
    return state, number


def simulate_fixed_size(drop: float, seeds: int, *, is_worse: bool) -> Figures:
    """Compare as many pairs as a sign test of fixed size needs; return that number, and how often its end is wrong."""
    z_error, z_power = (statistics.NormalDist().inv_cdf(quantile) for quantile in (1 - ERROR, POWER))
    points = drop / 100
    worse, better = (FAILURES + points) * (1 - FAILURES), FAILURES * (1 - FAILURES - points)
    differing = worse + better
    spreads = z_error * math.sqrt(differing) + z_power * math.sqrt(differing - points**2)
    size = math.ceil((spreads / points) ** 2)
    wrong = 0
    for seed in range(seeds):
        rng = random.Random(seed)
        failures = FAILURES + points * is_worse
        draws = [(rng.random() < failures) - (rng.random() < FAILURES) for _ in range(size)]
        is_found = sum(draws) > z_error * math.sqrt(sum(map(abs, draws)))
        wrong += is_found != is_worse
    return figures_of([size], [round(size / SHARES[0] * 100)], wrong / seeds, size)


def added_time(bench: Bench) -> None:
    """Ask one gateway by a route with a rollout and a shadow, and by a plain one, in turn."""
    from adapterhub.http_server.binding import free_port
    from tests.support import serving

    folder, port = bench.scratch / "added", free_port()
    folder.mkdir()
    call(make, folder)
    (folder / "routes.toml").write_text(ROUTES)
    with contextlib.ExitStack() as programs:
        engine = subprocess.Popen([sys.executable, HERE / "_made_up_engine.py", "engine", str(port), folder / "base"])
        programs.enter_context(engine)
        programs.callback(engine.kill)
        options = ("--engine", "vllm", "--engine-url", f"http://127.0.0.1:{port}", "--route", folder / "routes.toml")
        gateway = programs.enter_context(serving.gateway(folder / "base", folder / "registry", folder / "gateway", *options))
        count = bench.options.requests
        rolled = Program("adapterhub", process(median, gateway.url, "rolled", count), itself=True)
        plain = Program(PLAIN, process(median, gateway.url, "plain", count), itself=True)
        alone = Program(ALONE, process(median, gateway.url, "alone", count), itself=True)
        bench.add(ADDED, f"{count} requests", bench.turns(rolled, plain, alone))


ROUTES = """
[routes.plain]
to = "team/a0:prod"

[routes.alone]
to = "team/a0:prod"
candidate = "team/a1:prod"
steps = [{ share = 50, for = "1d" }, 100]

[routes.rolled]
to = "team/a0:prod"
candidate = "team/a1:prod"
steps = [{ share = 50, for = "1d" }, 100]
shadow = { to = "team/a2:prod", share = 100 }
"""


def make(folder: str) -> None:
    """Write a base, and a registry with three adapters of it."""
    from tests.support import serving

    serving.registry(Path(folder) / "registry", serving.make_models(Path(folder), adapters=3), 3).close()


def median(url: str, model: str, count: int) -> Figures:
    """Ask for answers on one connection; return the median time until the end of one."""
    parts, seconds = urlsplit(url), []
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    body = json.dumps({"model": model, "prompt": "the quick brown fox", "max_tokens": 4})
    for _ in range(count):
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(text.decode())
        seconds.append(time.perf_counter() - start)
    return {"ms": statistics.median(seconds) * 1e3}


if __name__ == "__main__":
    main(__doc__, JOBS, simulations, added_time, seeds=(200, 3), requests=(400, 8), rounds=(3, 1))
