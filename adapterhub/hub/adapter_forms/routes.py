"""The routes of the forms about an adapter."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from . import file_forms, name_forms, proposal_forms, release_forms
from .form_endpoint import change_endpoint, check_writer

_NAME = "/-/adapters/{namespace}/{repo}"
_CHANGES = {
    "tag": name_forms.set_tag,
    "remove-tag": name_forms.remove_tag,
    "deprecate": name_forms.deprecate,
    "visibility": name_forms.set_visibility,
    "decide-access": name_forms.decide_access,
    "grant-access": name_forms.grant_access,
    "retention": name_forms.keep,
    "remove": name_forms.remove,
    "promote": release_forms.promote,
    "approve": release_forms.approve,
    "rollback": release_forms.rollback,
    "withdraw": release_forms.withdraw,
}
_OWN_CHANGES = {"star": name_forms.set_star, "ask-access": name_forms.ask_access}
"""What everybody may do who sees the name."""
_DECISIONS = {
    "accept-proposal": (proposal_forms.accept_proposal, check_writer),
    "refuse-proposal": (proposal_forms.refuse_proposal, check_writer),
    "withdraw-proposal": (proposal_forms.withdraw_proposal, proposal_forms.check_withdrawal),
}


def routes() -> list[BaseRoute]:
    """Return the routes."""
    return [
        *(Route(f"{_NAME}/{action}", change_endpoint(work), methods=["POST"]) for action, work in _CHANGES.items()),
        Route(f"{_NAME}/gate", change_endpoint(name_forms.set_gate, limit=name_forms.MAX_GATE_FORM), methods=["POST"]),
        *(
            Route(f"{_NAME}/{action}", change_endpoint(work, check=None), methods=["POST"])
            for action, work in _OWN_CHANGES.items()
        ),
        *(
            Route(f"{_NAME}/{action}", change_endpoint(work, check=check, decides=True), methods=["POST"])
            for action, (work, check) in _DECISIONS.items()
        ),
        Route(
            f"{_NAME}/rename",
            change_endpoint(name_forms.rename, check=name_forms.check_movable, renames=True),
            methods=["POST"],
        ),
        Route(f"{_NAME}/restore", change_endpoint(name_forms.restore, check=name_forms.check_restorable), methods=["POST"]),
        Route(f"{_NAME}/edit/{{path:path}}", file_forms.commit_edit, methods=["POST"]),
        Route(f"{_NAME}/propose-edit/{{path:path}}", file_forms.propose_edit, methods=["POST"]),
        Route(f"{_NAME}/upload", file_forms.upload_files, methods=["POST"]),
        Route(f"{_NAME}/propose", file_forms.propose_files, methods=["POST"]),
    ]
