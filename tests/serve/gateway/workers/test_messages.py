"""What goes between the processes of a gateway arrives as it was sent."""

from __future__ import annotations

import json
from pathlib import Path

from adapterhub.serve.gateway.workers import messages
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.trained_prompt import TrainedPrompt


def test_a_blend_arrives_with_the_prompts_of_its_versions() -> None:
    digest = f"sha256:{'5' * 64}"
    prompt = TrainedPrompt("{{ messages }}", (("mood", "calm"), ("level", 2)), "2026-01-31")
    blend = tuple(
        (PreparedVersion("team/sql:v1", "team/sql", digest, "vllm", Path("served"), 8, ("--fp16",), ("folded",), sent), 0.5)
        for sent in (prompt, TrainedPrompt())
    )
    assert messages.blend_from(json.loads(json.dumps(messages.blend_document(blend)))) == blend
