"""Merges of families and kinds that a seed draws are peft's own, or are refused by name."""

from __future__ import annotations

import pytest

from tests.conftest import need_module
from tests.support import drawn_merges

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("number", range(5))
def test_a_drawn_merge_is_that_of_peft_or_refused(number: int) -> None:
    need_module("peft")
    family, kind = drawn_merges.draw(number, 1)[0]
    result, reason = drawn_merges.outcome(family, kind)
    assert result not in ("wrong", "gap"), f"{family}, {kind}: {reason}"


def test_the_share_of_right_merges_in_the_docs_is_of_the_installed_versions() -> None:
    need_module("peft")
    import peft
    import transformers

    start = f"merges drawn from the causal families of transformers {transformers.__version__} and the kinds of peft "
    assert f"{start}{peft.__version__}," in " ".join(drawn_merges.DOC.read_text().split()), (
        "run `python -m tests.support.drawn_merges`"
    )
