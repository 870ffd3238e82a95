"""Usage: the requests and tokens that gateways answered, by hour, key, version, route, arm, engine and path.

token_counts.py     the tokens of a request
answer_log.py       which version gave which answer, and what people think of it
record_place.py     where they are recorded: a file, or PostgreSQL
usage_database.py   the tables of requests and tokens
limits_database.py  the tables of limits
postgres_record.py  both in PostgreSQL
usage_recorder.py   recording them while a gateway runs, without holding up a request
shared_limits.py    what keys have used of their limits, for all gateways of a machine
delayed_limits.py   the same for gateways on several machines
price_list.py       prices of tokens: a TOML file of the user
usage_report.py     sums by key, version or day, and what they cost
"""
