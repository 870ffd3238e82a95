"""The process in which llama.cpp first loads a GGUF: one that makes it abort ends this process, and not the caller's.

llama.cpp checks much of a file by assertions (GGML_ASSERT), which end the process. `llama_cpp` runs this file before it loads
a model or an adapter itself. The arguments are the paths of the model and, if any, of the adapter. To start quickly, it imports
only the library; failures that llama.cpp reports are no concern of it, because the caller meets them, too.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

_ROOM = 64  # tokens of the context


def main(model: str, adapter: str = "") -> None:
    """Load the files and compute one token, as far as llama.cpp takes them."""
    os.putenv("GGML_NO_BACKTRACE", "1")  # the trace of a debugger takes seconds
    bindings: Any = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    handle = lib.llama_model_load_from_file(model.encode(), settings)
    delta = lib.llama_adapter_lora_init(handle, adapter.encode()) if adapter and handle != ffi.NULL else ffi.NULL
    if handle == ffi.NULL or (adapter and delta == ffi.NULL):
        return
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = _ROOM
    options.n_threads = options.n_threads_batch = 1
    context = lib.llama_init_from_model(handle, options)
    if context == ffi.NULL:
        return
    if adapter:
        lib.llama_set_adapters_lora(context, ffi.new("struct llama_adapter_lora *[]", [delta]), 1, ffi.new("float[]", [1.0]))
    lib.llama_decode(context, lib.llama_batch_get_one(ffi.new("llama_token[]", [0]), 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
