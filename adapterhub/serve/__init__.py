"""Serving: one base model that answers every request with the version of an adapter that it names.

Names, versions, checks and routing are ours; kernels and throughput are the engines'. `resolving` turns a ref into an immutable
folder that a runtime can load, `prepared_versions` keeps these folders, and `model_names` reads what a request may ask for.
"""
