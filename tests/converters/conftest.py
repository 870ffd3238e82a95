"""Property tests without a clock: a busy machine is no failure. Where time is the claim, a test measures it itself."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("formats", deadline=None)
settings.load_profile("formats")
