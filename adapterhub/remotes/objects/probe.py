"""A test of whether a store creates objects exclusively.

Stores that ignore `If-None-Match` report success and replace the object (rclone's, older radosgw), so only an attempt proves
anything. A positive result is recorded in `capabilities.json` next to the adapters, with the server that it holds for, because
a bucket may be copied to another. A negative one is not recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import AdapterhubError

from .bucket import Bucket, Unsupported

REMEMBERED = "capabilities.json"
_WRITERS = 8


def exclusive(bucket: Bucket) -> bool:
    """Tell whether one of several writers who create the same object wins, and the object is never replaced."""
    known = {"version": 1, "endpoint": bucket.endpoint, "exclusive": True}
    if bucket.endpoint and _remembered(bucket) == known:
        return True
    proven = _tried(bucket)
    if proven and bucket.endpoint:
        bucket.put(REMEMBERED, json.dumps(known, sort_keys=True).encode() + b"\n")
    return proven


def _remembered(bucket: Bucket) -> object:
    found = bucket.read(REMEMBERED, 1 << 16)
    try:
        return parse_object((found or b"").decode(), REMEMBERED)
    except (AdapterhubError, UnicodeDecodeError):
        return None


def _tried(bucket: Bucket) -> bool:
    one, many = (f"tmp/probe-{os.urandom(12).hex()}" for _ in range(2))
    bodies = [f"writer {number}".encode() for number in range(_WRITERS)]
    try:
        if not bucket.create(one, b"first") or bucket.create(one, b"late") or bucket.read(one, 100) != b"first":
            return False
        with ThreadPoolExecutor(_WRITERS) as pool:
            won = list(pool.map(lambda body: bucket.create(many, body), bodies))
        return won.count(True) == 1 and bucket.read(many, 100) == bodies[won.index(True)]
    except Unsupported:
        return False
    finally:
        for key in (one, many):
            with contextlib.suppress(AdapterhubError):  # without the right to remove them, a few bytes stay
                bucket.remove(key)
