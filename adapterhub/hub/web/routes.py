"""The routes of pages, by method and path. Anything but adapters is below /-/, which cannot be the name of a namespace."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.routing import BaseRoute, Route

from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import NotFoundError

from . import (
    account,
    adapter_pages,
    adapter_settings,
    admin,
    browsing,
    channels,
    commit_pages,
    compare,
    file_editor,
    namespace_settings,
    proposal_pages,
    signing_in,
)
from .form_requests import FormWork, form_endpoint
from .site import SIGN_IN, Page, PageRequest, page_endpoint, static

_NAME = "/{namespace}/{repo}"
_VERSION = f"{_NAME}/v{{number}}"
_FORMS: Mapping[str, FormWork] = {
    f"{account.PATH}/profile": account.set_profile,
    f"{account.PATH}/token": account.create_token,
    f"{account.PATH}/revoke": account.revoke_token,
    f"{namespace_settings.PATH}/member": namespace_settings.set_member,
    f"{namespace_settings.PATH}/readers": namespace_settings.set_readers,
    f"{namespace_settings.PATH}/ask-quota": namespace_settings.ask_quota,
    f"{namespace_settings.PATH}/drop-quota": namespace_settings.drop_quota,
    f"{namespace_settings.PATH}/key": namespace_settings.create_key,
    f"{namespace_settings.PATH}/revoke-key": namespace_settings.revoke_key,
    f"{namespace_settings.PATH}/webhook": namespace_settings.add_webhook,
    f"{namespace_settings.PATH}/remove-webhook": namespace_settings.remove_webhook,
    f"{namespace_settings.PATH}/publisher": namespace_settings.add_publisher,
    f"{namespace_settings.PATH}/remove-publisher": namespace_settings.remove_publisher,
    f"{admin.PATH}/settle": admin.settle,
    f"{admin.PATH}/quota": admin.set_quota,
    f"{admin.PATH}/refuse-quota": admin.refuse_quota,
    f"{admin.PATH}/invite": admin.invite,
    f"{admin.PATH}/account": admin.change_account,
    f"{admin.PATH}/rule": admin.add_rule,
    f"{admin.PATH}/remove-rule": admin.remove_rule,
    f"{admin.PATH}/revoke": admin.revoke,
}


def _unknown(page_request: PageRequest, _worker: Worker) -> Page:
    raise NotFoundError(page_request.path[:200], "there is no such page")


def routes() -> list[BaseRoute]:
    """Return the routes, in the order in which they are tried; the last one matches everything."""
    return [
        Route("/", page_endpoint(browsing.search_page)),
        Route("/-/static/{digest}/{name}", static),
        Route("/-/bases", page_endpoint(browsing.bases_page)),
        Route("/login", signing_in.login),
        Route(SIGN_IN, page_endpoint(signing_in.sign_in_page, public=True)),
        Route(SIGN_IN, signing_in.sign_in, methods=["POST"]),
        Route(signing_in.PROVIDER, signing_in.leave),
        Route(signing_in.BACK, signing_in.arrive),
        Route("/-/sign-out", signing_in.sign_out, methods=["POST"]),
        Route(admin.PATH, page_endpoint(admin.admin_page)),
        Route(account.PATH, page_endpoint(account.account_page)),
        Route(f"/-/adapters{_NAME}", page_endpoint(adapter_settings.settings_page)),
        Route(f"/-/adapters{_NAME}/edit/{{path:path}}", page_endpoint(file_editor.editor_page)),
        Route(f"{namespace_settings.PATH}/{{namespace}}", page_endpoint(namespace_settings.settings_page)),
        Route(f"{namespace_settings.PATH}/{{namespace}}/reads", page_endpoint(namespace_settings.reads_page)),
        *(Route(path, form_endpoint(work), methods=["POST"]) for path, work in _FORMS.items()),
        Route(f"{_NAME}/tree/{{revision}}", page_endpoint(adapter_pages.revision)),
        Route(f"{_NAME}/tree/{{revision}}/{{path:path}}", page_endpoint(adapter_pages.revision)),
        Route(f"{_NAME}/blob/{{revision}}/{{path:path}}", page_endpoint(commit_pages.file_page)),
        Route(f"{_NAME}/commit/{{revision}}", page_endpoint(commit_pages.commit_page)),
        Route(f"{_NAME}/commits", page_endpoint(commit_pages.commits_page)),
        Route(f"{_NAME}/discussions", page_endpoint(proposal_pages.proposals_page)),
        Route(f"{_NAME}/discussions/{{number}}", page_endpoint(proposal_pages.proposal_page)),
        Route(f"{_NAME}/versions", page_endpoint(adapter_pages.versions_page)),
        Route(f"{_NAME}/channels", page_endpoint(channels.channels_page)),
        Route(f"{_NAME}/compare", compare.compare_page),
        Route(_VERSION, page_endpoint(adapter_pages.adapter_page)),
        Route(f"{_VERSION}/tensors", page_endpoint(adapter_pages.tensors_page)),
        Route(f"{_VERSION}/heat.svg", adapter_pages.heat_picture),
        Route(f"{_VERSION}/norms", adapter_pages.norms_page),
        Route(f"{_VERSION}/lineage", page_endpoint(adapter_pages.lineage_page)),
        Route(_NAME, page_endpoint(adapter_pages.adapter_page)),
        Route("/{namespace}", page_endpoint(browsing.namespace_page)),
        Route("/{path:path}", page_endpoint(_unknown)),
    ]
