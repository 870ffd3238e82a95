"""What the host tells a worker as JSON arrives as it was."""

from __future__ import annotations

import json
from pathlib import Path

from adapterhub.serve.gateway.workers import messages
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.trained_prompt import TrainedPrompt


def test_versions_arrive_with_the_prompts_they_were_trained_with() -> None:
    prompt = TrainedPrompt("{{ messages }}", (("thinking", False), ("most", 3), ("style", "ünd")), "2026-07-01")
    version = PreparedVersion("team/a:v1", "team/a", "sha256:0", "peft", Path("/served/a"), 8, ("--x",), ("a note",), prompt)
    blend = ((version, 0.25), (PreparedVersion("team/b", "team/b", "sha256:1", "vllm", Path("/served/b"), 4), 1.0))
    assert messages.blend_from(json.loads(json.dumps(messages.blend_document(blend)))) == blend
