"""A test of whether a store creates objects exclusively.

Stores that ignore `If-None-Match` report success and replace the object (rclone's, older radosgw), so only an attempt proves
anything. A positive result is recorded in `capabilities.json` next to the adapters, with the server it holds for, because a
bucket may be copied to another server. A negative result is not recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import AdapterhubError

from .bucket import Bucket, ExclusiveCreateUnsupported

CAPABILITIES = "capabilities.json"
_WRITERS = 8


def creates_exclusively(bucket: Bucket) -> bool:
    """Return whether exactly one of several writers creates an object, which the others then never replace."""
    capabilities = {"version": 1, "endpoint": bucket.endpoint, "exclusive": True}
    if bucket.endpoint and _recorded_capabilities(bucket) == capabilities:
        return True
    is_exclusive = _probe(bucket)
    # A folder has no endpoint to compare, and a test of it costs nothing.
    if is_exclusive and bucket.endpoint:
        bucket.put_object(CAPABILITIES, json.dumps(capabilities, sort_keys=True).encode() + b"\n")
    return is_exclusive


def _recorded_capabilities(bucket: Bucket) -> object:
    """Return the recorded result; None without a valid one."""
    raw = bucket.read(CAPABILITIES, 1 << 16)
    try:
        return parse_object((raw or b"").decode(), CAPABILITIES)
    except (AdapterhubError, UnicodeDecodeError):
        return None


def _probe(bucket: Bucket) -> bool:
    """Create one object twice in a row, and another from several threads at once."""
    sequential_key, contested_key = (f"tmp/probe-{os.urandom(12).hex()}" for _ in range(2))
    bodies = [f"writer {number}".encode() for number in range(_WRITERS)]
    try:
        if (
            not bucket.create_object(sequential_key, b"first")
            or bucket.create_object(sequential_key, b"late")
            or bucket.read(sequential_key, 100) != b"first"
        ):
            return False
        # A store may check the condition without being atomic: only simultaneous writers show it.
        with ThreadPoolExecutor(_WRITERS) as pool:
            outcomes = list(pool.map(lambda body: bucket.create_object(contested_key, body), bodies))
        return outcomes.count(True) == 1 and bucket.read(contested_key, 100) == bodies[outcomes.index(True)]
    except ExclusiveCreateUnsupported:
        return False
    finally:
        for key in (sequential_key, contested_key):
            with contextlib.suppress(AdapterhubError):  # without the right to remove them, a few bytes stay
                bucket.remove(key)
