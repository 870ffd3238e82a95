"""index.json of an OCI image layout: every ref of the registry, one line each, so that skopeo and oras find them.

It has to be whole after every move of a ref, and grows with the registry: 17 MB at 50,000 versions. So a move changes the
lines of the one name that moved in the text that is there, which is a search and a copy, instead of making all of it anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from adapterhub.digest import Digest
from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import AdapterhubError

Line = tuple[str, Digest, int]
"""`namespace/name:tag`, and digest and size of the manifest. Lines are sorted by name; one name's lie together."""

_HEAD = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":['
_END = b"]}"
_START = (
    '{"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"application/vnd.cncf.model.manifest.v1+json",'
    '"digest":'
)
_NAME = '"annotations":{"org.opencontainers.image.ref.name":'


def build(lines: Iterable[Line]) -> bytes:
    """The text that says these lines."""
    text = ",\n".join(map(_dump, lines)).encode()
    return _HEAD + b"\n" + (text + b"\n" if text else b"") + _END


def replace(text: bytes, name: str, lines: Iterable[Line], *, before: str | None) -> bytes:
    """A text of `build` with `lines` in place of those of `name`; ValueError for another text.

    Args:
        text: Made by `build` or by this.
        name: `namespace/name`.
        lines: All that it has now.
        before: The name after it in the text, which its lines go before where it has none yet; None: it goes last.
    """
    start, end = _lines_of(text, name)
    if start < 0:  # it is new
        start = end = _lines_of(text, before)[0] if before else len(text) - len(_END)
    if start < len(_HEAD) or not text.startswith(_HEAD) or not text.endswith(_END):
        raise ValueError("not an index.json of ours")
    made = b"".join(_dump(line).encode() + b",\n" for line in lines)
    head, tail = text[:start], text[end:]
    if tail != _END:
        return head + made + tail
    if head.endswith(b"}\n"):
        head = head[:-1] + b",\n"
    whole = head + made
    return (whole[:-2] + b"\n" if whole.endswith(b",\n") else whole) + _END


def says(text: bytes, lines: Iterable[Line]) -> bool:
    """Whether an index.json, however it is spelled, has just these refs."""
    try:
        found = [
            (entry["annotations"]["org.opencontainers.image.ref.name"], entry["digest"], entry["size"])
            for entry in parse_object(text.decode(), "")["manifests"]
        ]
        return sorted(found) == sorted(lines)
    except (AdapterhubError, UnicodeDecodeError, LookupError, TypeError):
        return False


def _dump(line: Line) -> str:
    name, digest, size = line
    return f'{_START}"{digest}","size":{size},{_NAME}{json.dumps(name)}}}}}'


def _lines_of(text: bytes, name: str) -> tuple[int, int]:
    """Where the lines of `name` begin and end; -1 twice if there are none."""
    needle = (_NAME + json.dumps(name + ":")[:-1]).encode()
    at = text.find(needle)
    if at < 0:
        return -1, -1
    start = end = text.rfind(b"\n", 0, at) + 1
    while (stop := text.find(b"\n", end)) > 0 and text.find(needle, end, stop) > 0:
        end = stop + 1
    return start, end
