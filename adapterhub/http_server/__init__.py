"""What the servers of this package share: the hub and the gateway.

binding.py              the socket a server listens on
certificate.py          a certificate that is read again when it changes
client_connections.py   connections of clients, within limits
counted_connections.py  how many there are of each client, from before a TLS handshake on
rate_windows.py         counts of events in windows of time
work_time.py            limits on the CPU time of requests
logs.py                 log lines as JSON
request_bodies.py       bodies of requests, asked for first, counted while they arrive
watched_files.py        files that are read again once they have changed
"""
