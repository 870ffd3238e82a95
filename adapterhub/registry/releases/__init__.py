"""Releases: what a tag requires of a version, who approved it, and the moves that promote, roll back and withdraw."""
