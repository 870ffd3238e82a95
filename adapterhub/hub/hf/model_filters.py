"""The filters of a list of repositories: every parameter is applied, or refused with the reason, and never ignored.

The names are those of `HfApi.list_models` of huggingface_hub and of the Hub's API behind it.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import QueryParams

from adapterhub.hub.popularity import DOWNLOADS, LIKES
from adapterhub.index.version_listing import Conditions, Position
from adapterhub.index.version_search import Bound, Bounds
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .api_documents import EXPANDABLE, PREFIXED_KINDS, TAG_KINDS

MAX_LISTED = 100
"""The most repositories of a page; clients follow the link to the next one."""
_MAX_FILTERS = 50
_TRUE, _FALSE = ("true", "1", "True"), ("false", "0", "False", "")
_LIST_PARAMETERS = {
    "search", "author", "filter", "library", "pipeline_tag", "num_parameters", "gated", "sort", "direction", "limit", "cursor",
    "full", "cardData", "config", "expand",
}  # fmt: skip
_REASONS = {
    "apps": "does not know which programs run an adapter by their names on the Hub",
    "config": "has the config of an adapter in its files only",
    "inference": "runs no inference",
    "inference_provider": "runs no inference",
}
MODIFIED, CREATED = "lastModified", "createdAt"
ORDERS = (MODIFIED, CREATED, DOWNLOADS, LIKES)
_OTHER_NAMES = {"last_modified": MODIFIED, "created_at": CREATED}
_MAX_PARAMETERS = 2**63 - 1  # the largest number of an index: no adapter has more
_BOUNDS = {"min": ">=", "max": "<="}
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class ListRequest:
    """A parsed request for a list.

    Attributes:
        conditions: What the repositories must meet.
        gated: Whether they must be gated, or must not; None for both.
        after: Where the page before ended.
        limit: The most repositories of the page.
        order: What they are sorted by, one of ORDERS.
        ascending: List the oldest, or those with the lowest counts, first.
        fields: The fields to return; empty for the usual ones.
        with_files: Return the names of the files.
        with_card: Return the front matter of the card.
    """

    conditions: Conditions
    gated: bool | None
    after: Position | None
    limit: int
    order: str
    ascending: bool
    fields: tuple[str, ...]
    with_files: bool
    with_card: bool


def parse(params: QueryParams) -> ListRequest:
    """Parse the query of a list; UsageError for what this hub cannot do, with the reason."""
    for key in params:
        if key.removesuffix("[]") not in _LIST_PARAMETERS or (key == "config" and _flag(params, key)):
            raise UsageError(key[:80], f"this hub {_REASONS.get(key, 'does not filter by that')}", "Leave it out")
    order = params.get("sort") or MODIFIED
    order = _OTHER_NAMES.get(order, order)
    if order not in ORDERS:
        raise UsageError(f"sort={order[:40]}", f"this hub sorts by {', '.join(ORDERS)}", "Choose one of them")
    if params.get("direction", "-1") not in ("-1", "1"):
        raise UsageError(f"direction={params['direction'][:40]}", "is neither -1, the newest or highest first, nor 1")
    fields = expanded_fields(params)
    full = _flag(params, "full")
    return ListRequest(
        _conditions(params),
        _flag(params, "gated") if params.get("gated") else None,
        Position.parse(params["cursor"]) if params.get("cursor") else None,
        _limit(params),
        order,
        params.get("direction") == "1",
        fields,
        full or "siblings" in fields or "usedStorage" in fields,
        full or "cardData" in fields or _flag(params, "cardData"),
    )


def expanded_fields(params: QueryParams) -> tuple[str, ...]:
    """Return the fields that a client asks for by name; UsageError for one that this hub does not have."""
    fields = _texts([*params.getlist("expand"), *params.getlist("expand[]")])
    for name in fields:
        if name not in EXPANDABLE:
            raise UsageError(f"expand={name[:40]}", f"this hub does not have that of a model; it has {', '.join(EXPANDABLE)}")
    return fields


def _conditions(params: QueryParams) -> Conditions:
    facets = [_facet(tag) for tag in _texts(params.getlist("filter"))]
    facets += [(("library",), value) for value in _texts(params.getlist("library"))]
    facets += [(("pipeline",), value) for value in params.getlist("pipeline_tag") if value]
    if len(facets) > _MAX_FILTERS:
        raise UsageError("filter", f"more than {_MAX_FILTERS} filters")
    bounds = _parameters(params.get("num_parameters", ""))
    counted = (("parameters", bounds),) if bounds else ()
    return Conditions(params.get("search", ""), tuple(facets), params.get("author", "").lower(), counted)


def _facet(tag: str) -> tuple[tuple[str, ...], str]:
    """Return the facet that `api_documents.tags` shows as a tag."""
    prefixed = sorted(((prefix, kind) for kind, prefixes in PREFIXED_KINDS.items() for prefix in prefixes), reverse=True)
    for prefix, kind in prefixed:
        if value := tag.removeprefix(prefix) if tag.startswith(prefix) else "":
            return ("base-name" if kind == "base" and "/" not in value else kind,), value
    kind, _, value = tag.partition(":")
    if kind in ("library", "language") and value:
        return (kind,), value
    return TAG_KINDS, tag


def _parameters(text: str) -> Bounds:
    """Parse bounds such as `min:6B,max:128B`."""
    bounds: dict[str, Bound] = {}
    for part in filter(None, text.split(",")):
        key, _, number = part.partition(":")
        digits, unit = (number[:-1], number[-1:].upper()) if number[-1:].isalpha() else (number, "")
        if key not in _BOUNDS or unit not in _SIZES or not _is_short_number(digits):
            raise UsageError(f"num_parameters={text[:40]}", "is not a range of numbers", "Write it like min:1M,max:1B")
        bounds[key] = Bound(_BOUNDS[key], min(int(float(digits) * _SIZES[unit]), _MAX_PARAMETERS))
    return tuple(bounds.values())


def _is_short_number(text: str) -> bool:
    digits = text.replace(".", "", 1)
    return digits.isascii() and digits.isdecimal() and len(digits) < 16


def _limit(params: QueryParams) -> int:
    text = params.get("limit", "")
    if not text:
        return MAX_LISTED
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text)):
        raise UsageError(f"limit={text[:40]}", "is not a number above 0")
    return min(int(text), MAX_LISTED)


def _flag(params: QueryParams, key: str) -> bool:
    text = params.get(key, "")
    if text not in (*_TRUE, *_FALSE):
        raise UsageError(f"{key}={text[:40]}", "is neither true nor false")
    return text in _TRUE


def _texts(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(text for value in values for text in value.split(",") if text)
