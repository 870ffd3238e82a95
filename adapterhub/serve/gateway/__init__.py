"""The gateway: one OpenAI-compatible endpoint in front of any engine, where a name means a version.

gateway_settings.py   the settings that a gateway is started with
route_file.py         routes, canaries and keys: a TOML file
calendar_budgets.py   the tokens of a key in a day and a month
reloading.py          the routes and the policy, read again while it runs
problems.py           errors in OpenAI's form
lookup.py             the version that a ref names now
engine_versions.py    the versions that the engine holds: loaded once, forgotten when others need the room
gateway.py            who asks for what, what they may ask for, and what answers
rewriting.py          answers of engines, with the name of the version written into them
metrics.py            metrics for Prometheus, and for the gateways of Kubernetes
trace_context.py      the ids of requests and traces, in headers
spans.py              spans of OpenTelemetry
app.py                the ASGI application
page/                 the page for people: HTML, and a little JavaScript
server.py             the process: addresses that may be bound, start and end
"""
