"""What who runs a hub needs besides it.

routes.py    what is answered, by path
health.py    whether it is fit to serve, for a load balancer and for `hub doctor`
metrics.py   numbers for Prometheus
backup.py    the whole hub in one file, and back
"""
