"""What the push at the end of a training asks for, as far as it is known before the first step.

Hours of work must not end at a server that refuses the user, at a protected tag, or at a rule that the config cannot meet.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from adapterhub.http.http_errors import DeniedError
from adapterhub.manifest.document import TRAINER, AdapterManifest
from adapterhub.trust.attestation import TRAINING
from adapterhub_converters.errors import NotFoundError, RefusedError

from . import push, push_result, source_names
from .workspace import Workspace

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy
    from adapterhub.remotes.remote_address import RemoteAddress
    from adapterhub.training import TrainConfig
    from adapterhub.trust.keys import Signer

# Rules about what the config decides; others are about the files, or about what is measured.
_RULES_OF_CONFIG = ("formats", "licenses", "max_rank", "recorders")
_HINT = "Train without the push, and push the folder when it meets the rule"


def check(config: TrainConfig, target: str, signer: Signer | None, workspace: Workspace) -> None:
    """Raise the error that a push of the trained adapter would end with, as far as it is known now.

    Args:
        target: A ref or an address.
        signer: The signer of the training of the version; None for none.

    Raises:
        RefusedError: A policy forbids the adapter, its tag is protected, or the target keeps no attestations.
        RemoteError: The target cannot be reached, or the user may not write there.
        ConflictError: The name was removed.
    """
    policy = workspace.rules()
    if source_names.is_address(target):
        name = _check_address(target, signer, workspace)
    else:
        ref = push.pushable_ref(target, workspace)
        name = ref.name
        with suppress(NotFoundError), workspace.open_registry() as registry:  # the push creates a missing one
            registry.check_new_version(ref)
            policy = workspace.within(registry).rules()
    if policy is not None:
        policy.check_name(name)
        _check_policy(policy, config, name, target, signer)


def _check_address(target: str, signer: Signer | None, workspace: Workspace) -> str:
    """Ask the remote at an address; return the name that a policy checks."""
    address = push_result.target_address(target, workspace)
    rules = workspace.rules()
    if rules and address.reference in rules.gated_tags():
        problem = "the project has requirements on this tag, which no new version meets"
        raise RefusedError(target, problem, f"Push to {address.repository}, and promote the version")
    with workspace.connect(address) as remote:
        if not remote.check_push(None, address.reference):
            _check_rights(address, target, workspace)
        if signer is not None and remote.as_referring_target() is None:
            raise remote.unsupported_error("attachments", "Push without signing the training, or use an OCI registry")
        with suppress(NotFoundError):  # the push creates it
            remote.tags()
    return address.repository


def _check_rights(address: RemoteAddress, target: str, workspace: Workspace) -> None:
    """Raise DeniedError if the user may not write to an address, as far as the remote tells."""
    from adapterhub.remotes import remote_access
    from adapterhub.remotes.hub.hub_client import LOGIN, HubAddress
    from adapterhub.remotes.remote_address import name_of

    rights = None
    with suppress(NotFoundError):  # a hub that does not tell
        rights = remote_access.access_to(address, workspace.surroundings(), name_of(address).partition("/")[0])
    if rights and rights.writes is False:
        login = "" if rights.user else address.login if isinstance(address, HubAddress) else address.host
        hint = "" if rights.user or login else LOGIN
        raise DeniedError(target, f"may not be written to: {rights.reason}", hint, host=login)


def _check_policy(policy: Policy, config: TrainConfig, name: str, target: str, signer: Signer | None) -> None:
    """Compare the rules of a policy with what the config decides of the version, and with who signs its training."""
    from adapterhub.project.policy import refusal
    from adapterhub.trust.keys import read_trusted

    # PiSSA is saved as plain LoRA of twice the rank.
    rank = max([config.lora.r, *config.lora.rank_pattern.values()]) * (2 if config.lora.init == "pissa" else 1)
    manifest = AdapterManifest.salvage(
        {"r": rank, "format": "peft", "license": config.card.license, "training": {"recorder": TRAINER}}
    )
    for result in policy.manifest_checks(manifest):
        if result.rule in _RULES_OF_CONFIG and result.problem:
            raise refusal(target, result.file, [f"{result.rule}: {result.problem}"])
    for rule in policy.signing_rules(name):
        if rule.attestation != TRAINING or rule.least > 1:
            kind = f"attestation of {rule.attestation}" if rule.attestation else "signature of its files"
            raise refusal(target, rule.file, [f"{rule.rule}: a training makes no {kind}"], _HINT)
        if signer is None or signer.public.id not in {key.id for key in read_trusted(rule.keys)}:
            problem = "the training is not signed by one of its keys"
            raise refusal(target, rule.file, [f"{rule.rule}: {problem}"], "Sign it with one of them")
