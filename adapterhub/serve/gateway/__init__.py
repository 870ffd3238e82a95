"""The gateway: one OpenAI-compatible endpoint in front of any engine, where a name means a version.

settings.py     what a gateway is started with
route_file.py   names of its own, canaries, keys: a TOML file
reloading.py    these and the policy, read again while it runs
answers.py      errors in OpenAI's form
lookup.py       which version a ref names now
versions.py     versions that the engine holds: made ready once, forgotten when others need the room
gateway.py      who asks for what, what they may ask for, and what answers
rewriting.py    answers of engines with the name of the version in them
metrics.py      numbers for Prometheus, and for the gateways of Kubernetes
app.py          the ASGI application
page/           the page for people: HTML, and a little JavaScript
server.py       the process: addresses that may be bound, start and end
"""
