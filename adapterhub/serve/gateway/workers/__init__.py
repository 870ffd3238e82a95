"""A gateway of several processes: workers that talk to clients, and one host that knows names, keys, limits and versions.

    channel.py         messages between a worker and the host
    messages.py        versions, errors and engines as JSON
    processes.py       forking workers, and starting those again that have ended
    worker_gateway.py  the gateway of a worker, which asks the host; the engine is asked by the worker itself if it is a server
    worker.py          the process of a worker
    host.py            the gateway that all workers ask, and its process, which owns the engine

The host counts for all workers what one process would count, so that limits, budgets and metrics are those of one gateway.
"""
