"""Fields of a request's JSON object."""

from __future__ import annotations

import re

import pytest

from adapterhub.hub.api.request_fields import text_field
from adapterhub_converters.errors import UsageError


@pytest.mark.parametrize(
    ("fields", "problem"), [({"name": "ada"}, "account: is missing"), ({"account": 7}, "account: is not a text")]
)
def test_a_text_that_is_missing_is_told_from_one_that_is_none(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)):
        text_field(fields, "account")
