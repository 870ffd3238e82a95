"""The routes of the API, by method and path."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from . import administration, changing, gate, namespaces, own_account, proposing, reading, releasing
from .api_requests import PREFIX, Handler, endpoint_of

_NAME = f"{PREFIX}/names/{{namespace}}/{{repo}}"
_VERSION = f"{_NAME}/versions/{{reference}}"
_TAG = f"{_NAME}/tags/{{tag}}"
_PROPOSAL = f"{_NAME}/proposals/{{ident}}"
_TOKENS, _ACCOUNT, _SPACE = f"{PREFIX}/account/tokens", f"{PREFIX}/accounts/{{account}}", f"{PREFIX}/namespaces/{{namespace}}"
_ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/api/adapterhub", reading.about),
    ("GET", f"{PREFIX}/versions", reading.versions),
    ("GET", f"{PREFIX}/search", reading.search),
    ("POST", f"{PREFIX}/find", reading.find),
    ("GET", f"{PREFIX}/usage", reading.usage),
    ("DELETE", _NAME, changing.delete_name),
    ("POST", f"{_NAME}/restore", changing.restore_name),
    ("POST", f"{_NAME}/move", changing.move),
    ("GET", f"{_NAME}/log", reading.log),
    ("GET", f"{_NAME}/downloads", reading.downloads),
    ("GET", f"{_NAME}/gate", gate.show_gate),
    ("PUT", f"{_NAME}/gate", gate.set_gate),
    ("DELETE", f"{_NAME}/gate", gate.set_gate),
    ("PUT", f"{_NAME}/deprecation", changing.deprecate),
    ("DELETE", f"{_NAME}/deprecation", changing.deprecate),
    ("GET", f"{_NAME}/retention", reading.retention),
    ("PUT", f"{_NAME}/retention", changing.keep),
    ("DELETE", f"{_NAME}/retention", changing.keep),
    ("POST", f"{_NAME}/versions", changing.publish),
    ("GET", _VERSION, reading.show),
    ("GET", f"{_VERSION}/lineage", reading.lineage),
    ("PUT", f"{_VERSION}/deprecation", changing.deprecate),
    ("DELETE", f"{_VERSION}/deprecation", changing.deprecate),
    ("POST", f"{_VERSION}/evaluations", releasing.evaluate),
    ("POST", f"{_VERSION}/approvals", releasing.approve),
    ("PUT", f"{_VERSION}/withdrawal", releasing.withdraw),
    ("DELETE", f"{_VERSION}/withdrawal", releasing.undo_withdrawal),
    ("GET", f"{_TAG}/promotion", releasing.assess),
    ("POST", f"{_TAG}/promotion", releasing.promote),
    ("POST", f"{_TAG}/rollback", releasing.rollback),
    ("GET", f"{_NAME}/proposals", proposing.proposals_of),
    ("GET", _PROPOSAL, proposing.proposal),
    ("DELETE", _PROPOSAL, proposing.withdraw),
    ("POST", f"{_PROPOSAL}/acceptance", proposing.accept),
    ("POST", f"{_PROPOSAL}/refusal", proposing.refuse),
    ("GET", _TAG, reading.tag),
    ("PUT", _TAG, changing.put_tag),
    ("DELETE", _TAG, changing.delete_tag),
    ("POST", f"{_TAG}/restore", changing.restore_tag),
    ("PUT", f"{_TAG}/protection", changing.protect),
    ("DELETE", f"{_TAG}/protection", changing.protect),
    ("GET", f"{PREFIX}/account", own_account.account),
    ("PUT", f"{PREFIX}/account/profile", own_account.set_profile),
    ("GET", _TOKENS, own_account.tokens),
    ("POST", _TOKENS, own_account.create_token),
    ("DELETE", f"{_TOKENS}/{{ident}}", own_account.revoke_token),
    ("GET", _SPACE, namespaces.settings),
    ("PATCH", _SPACE, namespaces.change_settings),
    ("GET", f"{_SPACE}/members", namespaces.members),
    ("PUT", f"{_SPACE}/members/{{account}}", namespaces.set_member),
    ("DELETE", f"{_SPACE}/members/{{account}}", namespaces.remove_member),
    ("PUT", f"{_SPACE}/quota", namespaces.set_quota),
    ("PUT", f"{_SPACE}/quota-request", namespaces.request_quota),
    ("DELETE", f"{_SPACE}/quota-request", namespaces.drop_quota_request),
    ("GET", f"{_SPACE}/deploy-keys", namespaces.deploy_keys),
    ("POST", f"{_SPACE}/deploy-keys", namespaces.create_deploy_key),
    ("DELETE", f"{_SPACE}/deploy-keys/{{ident}}", namespaces.revoke_deploy_key),
    ("GET", f"{_SPACE}/webhooks", namespaces.webhooks),
    ("POST", f"{_SPACE}/webhooks", namespaces.add_webhook),
    ("DELETE", f"{_SPACE}/webhooks/{{ident}}", namespaces.remove_webhook),
    ("GET", f"{_SPACE}/publishers", namespaces.publishers),
    ("POST", f"{_SPACE}/publishers", namespaces.add_publisher),
    ("DELETE", f"{_SPACE}/publishers/{{ident}}", namespaces.remove_publisher),
    ("GET", f"{PREFIX}/accounts", administration.accounts),
    ("POST", f"{PREFIX}/accounts", administration.invite),
    ("DELETE", _ACCOUNT, administration.remove_account),
    ("PUT", f"{_ACCOUNT}/disabled", administration.disable_account),
    ("DELETE", f"{_ACCOUNT}/disabled", administration.disable_account),
    ("PUT", f"{_ACCOUNT}/role", administration.set_role),
    ("DELETE", f"{_ACCOUNT}/role", administration.remove_role),
    ("GET", f"{PREFIX}/tokens", administration.tokens),
    ("DELETE", f"{PREFIX}/tokens/{{ident}}", administration.revoke_token),
    ("GET", f"{PREFIX}/admissions", administration.admissions),
    ("POST", f"{PREFIX}/admissions", administration.add_admission),
    ("DELETE", f"{PREFIX}/admissions/{{ident}}", administration.remove_admission),
    ("GET", f"{PREFIX}/storage", administration.storage),
    ("GET", f"{PREFIX}/audit", administration.audit),
    ("GET", f"{PREFIX}/reads", administration.reads),
)


def routes() -> list[BaseRoute]:
    """Return the routes."""
    return [
        Route(path, endpoint_of(handler, rehearses=rehearses(handler)), methods=[method]) for method, path, handler in _ROUTES
    ]


def rehearses(handler: Handler) -> bool:
    """Return whether a change takes `dry_run`: each one of names and releases does."""
    return handler.__module__ in (changing.__name__, releasing.__name__)
