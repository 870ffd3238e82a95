"""Adapters in object stores, and in folders with the same layout.

object_address     `s3://…`, `gs://…`, `az://…`, `file://…`
object_repository  an adapter there; `name_log`, the log of its refs
bucket             requests, through obstore; `store_settings`, how the environment has it opened
exclusive_create   whether a store creates objects exclusively
"""
