"""The packaging layer for LoRA adapters: describe, check, convert, version, merge and train them.

    import adapterhub as ah

    ah.check("./sql", base="./Qwen3-0.6B").ok

The public names are those of `__all__`; docs/python.md shows them at work. Each is imported when it is first used, so that
`import adapterhub` loads neither numpy nor anything else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from adapterhub.version import __version__ as __version__

if TYPE_CHECKING:
    from adapterhub.analysis.diff import Difference
    from adapterhub.api import Adapter, bom, check, convert, describe, diff, load, merge, pull, push, scan
    from adapterhub.checks.report import Problem, Report
    from adapterhub.generation import Generation
    from adapterhub.identity import Identity
    from adapterhub.local_registry import Registry, Versions
    from adapterhub.operations.attest import Inputs, attest
    from adapterhub.operations.audit import Audit, audit, sign_checkpoint
    from adapterhub.operations.base_models import ConvertedModel, convert_model, read_base
    from adapterhub.operations.generate import generate
    from adapterhub.operations.merge import MergeResult
    from adapterhub.operations.pull import PullResult
    from adapterhub.operations.push_result import PushResult
    from adapterhub.operations.scan import Scan
    from adapterhub.operations.sign import Signature, Verification, sign, verify
    from adapterhub.operations.train import evaluate, open_trainer, train
    from adapterhub.operations.workspace import Workspace
    from adapterhub.project.policy import Policy
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Version
    from adapterhub.serve.prepared_versions import PreparedVersion
    from adapterhub.serve.resolving import resolve
    from adapterhub.trust.attestation import VerifiedAttestation
    from adapterhub.trust.bill import Bill
    from adapterhub_converters.adapter import LossReport
    from adapterhub_converters.errors import AdapterhubError

__all__ = [
    "Adapter",
    "AdapterhubError",
    "Audit",
    "Bill",
    "ConvertedModel",
    "Difference",
    "Generation",
    "Identity",
    "Inputs",
    "LossReport",
    "MergeResult",
    "Policy",
    "PreparedVersion",
    "Problem",
    "PullResult",
    "PushResult",
    "Ref",
    "Registry",
    "Report",
    "Scan",
    "Signature",
    "Verification",
    "VerifiedAttestation",
    "Version",
    "Versions",
    "Workspace",
    "attest",
    "audit",
    "bom",
    "check",
    "convert",
    "convert_model",
    "describe",
    "diff",
    "evaluate",
    "generate",
    "load",
    "merge",
    "open_trainer",
    "pull",
    "push",
    "read_base",
    "resolve",
    "scan",
    "sign",
    "sign_checkpoint",
    "train",
    "verify",
]  # fmt: skip

_MODULES = {
    "adapterhub.analysis.diff": ("Difference",),
    "adapterhub.api": ("Adapter", "bom", "check", "convert", "describe", "diff", "load", "merge", "pull", "push", "scan"),
    "adapterhub.operations.attest": ("Inputs", "attest"),
    "adapterhub.operations.audit": ("Audit", "audit", "sign_checkpoint"),
    "adapterhub.operations.base_models": ("ConvertedModel", "convert_model", "read_base"),
    "adapterhub.checks.report": ("Problem", "Report"),
    "adapterhub.operations.merge": ("MergeResult",),
    "adapterhub.generation": ("Generation",),
    "adapterhub.identity": ("Identity",),
    "adapterhub.operations.train": ("evaluate", "open_trainer", "train"),
    "adapterhub.local_registry": ("Registry", "Versions"),
    "adapterhub.project.policy": ("Policy",),
    "adapterhub.ref": ("Ref",),
    "adapterhub.registry.registry": ("Version",),
    "adapterhub.operations.generate": ("generate",),
    "adapterhub.operations.scan": ("Scan",),
    "adapterhub.serve.resolving": ("resolve",),
    "adapterhub.serve.prepared_versions": ("PreparedVersion",),
    "adapterhub.operations.pull": ("PullResult",),
    "adapterhub.operations.push_result": ("PushResult",),
    "adapterhub.operations.sign": ("Signature", "Verification", "sign", "verify"),
    "adapterhub.trust.attestation": ("VerifiedAttestation",),
    "adapterhub.trust.bill": ("Bill",),
    "adapterhub.operations.workspace": ("Workspace",),
    "adapterhub_converters.adapter": ("LossReport",),
    "adapterhub_converters.errors": ("AdapterhubError",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    # Kept in the module, so that the next access does not come here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
