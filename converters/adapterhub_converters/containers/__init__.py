"""Containers of formats: safetensors, GGUF, and JSON files, read with every length checked and written reproducibly.

safetensors_file  safetensors; `safetensors_header`, their headers
gguf_file         GGUF in; `gguf_output`, out; `gguf_types`, its types
json_file         JSON; `toml_file`, TOML
open_file         the only way to open a file; `confined_files`, below a folder of somebody else
atomic            output that appears completely or not at all
file_lock         locks of open files
"""
