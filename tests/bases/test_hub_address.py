"""Addresses of models on a hub: what each names, and what is refused."""

from __future__ import annotations

import pytest

from adapterhub.bases.hub_address import HubPath
from adapterhub_converters.errors import UsageError
from tests.bases.test_remote_base import read


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hf://gpt2", HubPath("gpt2")),
        ("hf://org/m@v1.0/a/b.gguf", HubPath("org/m", "v1.0", "a/b.gguf")),
        ("hf://org/m@refs/pr/7", HubPath("org/m", "refs/pr/7")),
        ("hf://org/m@refs%2Fpr%2F7/x", HubPath("org/m", "refs/pr/7", "x")),
    ],
)
def test_places_on_a_hub(text: str, place: HubPath) -> None:
    assert HubPath.parse(text) == place
    assert HubPath.parse(str(place)) == place


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf://", "not a model on a hub"),
        ("hf:///m", "not a model on a hub"),
        ("hf://a--b/c", "'a--b/c' is not a valid model name"),
        ("hf://.org/m", "'.org/m' is not a valid model name"),
        ("hf://org/m@", "not a model on a hub"),
        ("hf://org/m/../x", "the revision or the path is not valid"),
        ("hf://org/m@a%0Ab", "the revision or the path is not valid"),
    ],
)
def test_what_is_no_place_on_a_hub_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        HubPath.parse(text)
    hint = "Write hf://org/model, hf://org/model@revision or hf://org/model/file.gguf"
    assert str(error.value) == f"{text}: {words}. {hint}"


@pytest.mark.parametrize("url", ["http://", "https://user:secret@host/x.gguf", "http://[::1/x", "http://host:port/x"])
def test_a_malformed_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(url)
    assert "secret" not in str(caught.value)
