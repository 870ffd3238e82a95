"""Bytes on disk: blobs, the ref log, leases and packs; no SQL.

store            the layout: blobs, and the log of every ref
store_files      its files, read and written without following links
ref_log          each move of a ref as one file; `log_chain`, how each entry seals those before it
ingest           blobs in; `export`, blobs out
leases           what running processes need
packs            compressed blobs
named_documents  bases, recipes and records of repositories
signature_files  signatures of versions
oci_index        index.json, for skopeo and oras
tensor_digests   digests of single tensors
"""
