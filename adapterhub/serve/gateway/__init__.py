"""The gateway: one OpenAI-compatible endpoint in front of any engine, where a name means a version.

gateway_settings.py   the settings that a gateway is started with
route_file.py         routes, canaries and keys: a TOML file
calendar_budgets.py   the tokens of a key in a day and a month
reloading.py          the routes and the policy, read again while it runs
openai_errors.py      errors in OpenAI's form
api_forms.py          what responses and messages have in other places than completions
ollama.py             Ollama's API, translated to and from that of the engine
cross_origin.py       pages of other sites that may use the API
lookup.py             the version that a ref names now
rollout_plan.py       what a route says of a rollout and of its shadow
rollout_evidence.py   requests of both arms of a rollout, compared in pairs
rollouts.py           the share that the candidate of a route gets now, by the log of the registry
shadows.py            copies of requests to another version, whose answers nobody sees
deprecations.py       the header of an answer from a deprecated version
priorities.py         priorities of keys
warm_routes.py        targets of routes that are loaded before they are asked for, or stay loaded
engine_versions.py    the versions that the engine holds: loaded once, forgotten when others need the room
moving_refs.py        refs that may move, and the versions that they have moved to
access.py             who may ask, and how much
front.py              what every process of a gateway has: a request is checked, and the engine is asked
gateway.py            which version answers a request, and what is recorded of it
rewriting.py          answers of engines, with the name of the version written into them
metrics.py            metrics for Prometheus, and for the gateways of Kubernetes
engine_metrics.py     those of each of several engines
trace_context.py      the ids of requests and traces, in headers
spans.py              spans of OpenTelemetry
local_routes.py       what is answered without the engine: models, health, metrics, the page
app.py                the ASGI application, and what the engine answers
workers/              several processes that answer clients, and one that knows names, keys, limits and versions
page/                 the page for people: HTML, and a little JavaScript
server.py             the process: addresses that may be bound, start and end
"""
