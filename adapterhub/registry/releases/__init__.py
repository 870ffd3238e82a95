"""Releases: what a tag requires of a version, who approved it, rollouts, and the moves that promote, roll back and withdraw."""
