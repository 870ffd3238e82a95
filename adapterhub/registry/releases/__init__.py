"""Releases: what a tag requires of a version, who approved it, rollouts, and the moves that promote, roll back and withdraw.

tag_requirements   whether a version meets what a tag requires, with `metric_gates` and `approvals`
tag_gate           asks that at every move of a tag
release_moves      promotions, approvals, rollbacks and withdrawals in the log
withdrawal_rights  who may withdraw a signed version
rollouts           rollouts in the log
"""
