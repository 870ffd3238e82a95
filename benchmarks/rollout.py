"""Roll a candidate out: how often the rules err, how many requests they take, and what they add to an answer.

    python benchmarks/rollout.py [--seeds 200] [--requests 400] [--rounds 3]

A rollout is simulated with the rules and the evidence of the gateway: requests are drawn to both arms, of which the stable one
fails in 10 % and the candidate in so many points more, and the state is looked at after every 20 requests. `wrong %` are the
rollouts that ended in the wrong way, `needed` is the median number of pairs until the end, and `planned` what the rules say a
drop needs. Then one gateway over an engine that costs nothing answers through a route with a rollout and a shadow, one
with a rollout alone, and one without either, in turn.
"""

from __future__ import annotations

import contextlib
import http.client
import json
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
SIMULATION, ADDED = "wrong ends of simulated rollouts", "answer through a route"
JOBS: dict[str, list[str]] = {SIMULATION: [], ADDED: [PLAIN, ALONE]}
FAILURES = 0.1  # of the stable arm
DROPS = (2.0, 5.0, 20.0)  # points
MOST_REQUESTS = 400_000
LOOK_INTERVAL = 20  # requests between two looks at the state


def simulations(bench: Bench) -> None:
    """Simulate candidates that are no worse, and some that are worse by the drop that the bound names."""
    seeds = bench.options.seeds
    for drop in DROPS:
        for is_worse in (False, True):
            work = Program("adapterhub", process(simulate, drop, seeds, is_worse=is_worse), itself=True)
            figures = work.run()
            kind = f"worse by {drop:g} points" if is_worse else f"no worse, for a drop of {drop:g} points"
            limit = (10 if is_worse else 1) + 300 / seeds  # percent; a few seeds say little
            claims = {"errors as stated": figures["wrong %"] <= limit}
            bench.add(SIMULATION, kind, {"adapterhub": figures}, claims)


def simulate(drop: float, seeds: int, *, is_worse: bool) -> Figures:
    """Run rollouts; return the share that ended in the wrong way, and the pairs that a verdict took."""
    from adapterhub.evidence import rollout_rules
    from adapterhub.manifest.rollout_state import ROLLED_BACK

    pairs, wrong, planned = [], 0, 0.0
    for seed in range(seeds):
        state = rollout(seed, drop, FAILURES + drop / 100 * is_worse)
        was_rolled_back = state.state == ROLLED_BACK
        wrong += was_rolled_back != is_worse
        [verdict] = rollout_rules.verdicts(state)
        planned = verdict.needed
        if was_rolled_back == is_worse:
            pairs.append(verdict.pairs)
    # A hundredth of a point instead of none: figures of benchmarks are above 0.
    return {
        "wrong %": max(wrong / seeds * 100, 0.01),
        "needed": float(statistics.median(pairs or [1])),
        "planned": float(planned),
    }


def rollout(seed: int, drop: float, failures: float) -> Any:
    """Return the last state of a rollout of two steps, whose candidate fails so often."""
    from adapterhub.evidence import rollout_rules
    from adapterhub.manifest.rollout_state import RUNNING, RolloutState, RolloutStep
    from adapterhub.serve.gateway.rollout_evidence import AnswerOutcome, Evidence

    rng = random.Random(seed)
    state = RolloutState("legal", "team/legal@sha256:0", (RolloutStep(40, 1), RolloutStep(60, 1)), {"errors": drop})
    evidence, outcomes = Evidence(state.bounds), (AnswerOutcome(), AnswerOutcome(failed=True))
    for number in range(MOST_REQUESTS):
        is_candidate = rng.random() * 100 < state.share
        trial = evidence.admit("", str(number), is_candidate=is_candidate)
        assert trial is not None
        evidence.finish(trial, outcomes[rng.random() < (failures if is_candidate else FAILURES)])
        if number % LOOK_INTERVAL == 0:
            new_counts, evidence.counts = evidence.counts, {}
            state = rollout_rules.next_state(rollout_rules.with_evidence(state, state.seconds + 1, new_counts))
            if state.state != RUNNING:
                break
    return state


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
