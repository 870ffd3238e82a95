"""A Hugging Face hub as a whole: whom its `whoami-v2` takes us for, and what it says our token may do."""

from __future__ import annotations

import json
from collections.abc import Sequence

from adapterhub.remotes.location import Access
from adapterhub.remotes.wire import PAUSES, DeniedError, Wire
from adapterhub_converters.errors import FormatError

_LARGEST = 1 << 20  # bytes of an answer: it lists every organization


def access(endpoint: str, token: str | None, org: str = "", *, pauses: Sequence[float] = PAUSES) -> Access:
    """What a hub grants, in an organization or in the account of one's own.

    Whether a token that was made for single repositories may write to one isn't said: then `writes` is None.

    Raises:
        RemoteError: No hub answers, or it refuses the token.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hint = "Log in with `hf auth login`"
    wire = Wire(endpoint, None, hint, lambda: (token,) if token else (), pauses)
    try:
        url = f"{endpoint}/api/whoami-v2"  # the token goes nowhere else: a redirect is none of the good answers
        answer = wire.ask("GET", url, endpoint, good=(200,), headers=headers, limit=_LARGEST, redirects=False)
    except DeniedError:
        if token:
            raise
        return Access("", "", reads=True, writes=False, why="it takes a login")
    finally:
        wire.close()
    try:
        document = json.loads(answer.body)
        name = str(document["name"])
        role = str(((document.get("auth") or {}).get("accessToken") or {}).get("role") or "")
        orgs = [str(one.get("name")) for one in document.get("orgs") or []]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(endpoint, "what answers there is no Hugging Face hub") from error
    if org and org not in (name, *orgs):
        return Access(name, "its token", reads=True, writes=False, why=f"{name} is not in {org}")
    writes = {"write": True, "read": False}.get(role)
    return Access(name, "its token", reads=True, writes=writes, why="its token may only read" if writes is False else "")
