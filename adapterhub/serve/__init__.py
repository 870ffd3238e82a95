"""Serving: one base model, for every request the version of an adapter that it names.

Names, versions, checks and routing are ours; kernels and throughput are the engines'. `resolving` turns a ref into an immutable
folder that a runtime can load, `served` keeps these folders, `names` reads what a request may ask for.
"""
