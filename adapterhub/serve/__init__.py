"""Serving: one base model that answers every request with the version of an adapter that it names.

    gateway       the endpoint; `engines`, what it starts and asks; `torch_engine`, ours; `usage`, what is recorded
    vllm_plugin   names in vLLM itself, with `vllm_rank`
    conversation  one or two models in a terminal

Names, versions, checks and routing are ours; kernels and throughput are the engines'. `resolving` turns a ref into an immutable
folder that a runtime can load, `prepared_versions` keeps these folders, and `model_names` reads what a request may ask for.
"""
