"""What the servers of this package share: the hub and the gateway.

binding.py      the socket that a server listens on
connections.py  connections of clients, bounded
limits.py       counts of events in windows of time
logs.py         log lines as JSON
"""
