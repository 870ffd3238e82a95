"""Tools for the operator of a hub.

routes.py       the routes, by path
health.py       whether the hub is fit to serve, for a load balancer and for `hub doctor`
prometheus.py   numbers for Prometheus
runtime_metrics.py  those of threads, connections, the bucket and queues
backup.py       the whole hub in one file, and its restoration
"""
