"""The chat templates that llama-server reads from files are whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.serve.engines.llama_router import Router
from adapterhub.serve.engines.llama_server import LlamaServerOptions
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import LocalIOError
from adapterhub_converters.trained_prompt import TrainedPrompt

resource = pytest.importorskip("resource")


def test_a_template_that_did_not_fit_on_the_disk_is_written_again(tmp_path: Path) -> None:
    prompt = TrainedPrompt("{{ 'ü' }}" * 20_000)
    version = PreparedVersion("team/a:v1", "team/a", f"sha256:{'a' * 64}", "llama.cpp", tmp_path / "a.gguf", 4, prompt=prompt)
    router = Router(LlamaServerOptions(tmp_path / "llama-server", tmp_path / "base.gguf", tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(LocalIOError, match="File too large"):
            router._write_template(version)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path = router._write_template(version)
    assert path is not None
    assert path.read_bytes().decode() == prompt.template
