"""What the servers of this package share: the hub and the gateway.

binding.py              the socket a server listens on
client_connections.py   connections of clients, within limits
limits.py               counts of events in windows of time
logs.py                 log lines as JSON
"""
