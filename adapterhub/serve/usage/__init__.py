"""Usage: the requests and tokens that gateways answered, by hour, key, version, route, arm, engine and path.

token_counts.py     the tokens of a request
usage_database.py   the file that they are recorded in
usage_recorder.py   recording them while a gateway runs, without holding up a request
shared_limits.py    what keys have used of their limits, for all gateways of a machine
price_list.py       prices of tokens: a TOML file of the user
usage_report.py     sums by key, version or day, and what they cost
"""
