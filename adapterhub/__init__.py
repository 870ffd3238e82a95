"""The packaging layer for LoRA adapters: describe, check, convert, version, merge and train them.

    import adapterhub as ah

    ah.check("./sql", base="./Qwen3-0.6B").ok

The public names are those of `__all__`; docs/python.md shows them at work. Each is imported when it is first used, so that
`import adapterhub` loads neither numpy nor anything else.
"""

from typing import TYPE_CHECKING

from adapterhub.version import __version__ as __version__
from adapterhub_converters.lazy_imports import lazy_names

if TYPE_CHECKING:
    from adapterhub.analysis.diff_result import Difference
    from adapterhub.checks.report import Problem, Report, Verdict
    from adapterhub.evaluation.results import EvaluationResult
    from adapterhub.generation import Generation
    from adapterhub.identity import Identity
    from adapterhub.index.queries import VersionRow
    from adapterhub.maintenance.findings import Finding
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.manifest.package_files import Selection
    from adapterhub.merging import MergeReport, ModelMergeReport
    from adapterhub.operations.attest import attest
    from adapterhub.operations.attest_predicates import Inputs
    from adapterhub.operations.audit import Audit, audit, sign_checkpoint
    from adapterhub.operations.base_models import ConvertedModel, convert_model, read_base
    from adapterhub.operations.bom import bom
    from adapterhub.operations.check import check, validate
    from adapterhub.operations.convert import convert
    from adapterhub.operations.describe import DescribeResult, describe
    from adapterhub.operations.diff import diff
    from adapterhub.operations.generate import generate
    from adapterhub.operations.load import Adapter, load
    from adapterhub.operations.local_registry import Registry, Versions
    from adapterhub.operations.merge import MergeResult, merge
    from adapterhub.operations.merge_into import merge_into
    from adapterhub.operations.pull import PullResult, pull
    from adapterhub.operations.push import push
    from adapterhub.operations.push_result import PushResult
    from adapterhub.operations.scan import Scan, scan
    from adapterhub.operations.sign import Signature, Verification, sign, verify
    from adapterhub.operations.signature_checks import Demand
    from adapterhub.operations.train import evaluate, open_trainer, train
    from adapterhub.operations.workspace import Workspace
    from adapterhub.project.policy import Policy
    from adapterhub.ref import Ref
    from adapterhub.registry.adapter_recipe import Conversion
    from adapterhub.registry.content_search import ContentMatches
    from adapterhub.registry.lineage_graph import Lineage
    from adapterhub.registry.registry import Version
    from adapterhub.registry.shown_version import VersionDocument
    from adapterhub.registry.version_lookup import RestoreResult
    from adapterhub.serve.prepared_versions import PreparedVersion
    from adapterhub.serve.resolving import resolve
    from adapterhub.store.ref_log import Entry
    from adapterhub.training.events import TrainingResult
    from adapterhub.training.train_config import TrainConfig
    from adapterhub.trust.attestation import VerifiedAttestation
    from adapterhub.trust.cyclonedx_bom import Bill
    from adapterhub_converters.adapter import LossReport, TensorLoss
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.errors import (
        AdapterhubError,
        ConflictError,
        FormatError,
        IntegrityError,
        LocalIOError,
        MissingExtraError,
        NotFoundError,
        NotUnderstoodError,
        OutputExistsError,
        ParameterError,
        RefusedError,
        RemoteError,
        StoppedError,
        UsageError,
    )
    from adapterhub_converters.formats import InstalledFormat

__all__ = [
    "Adapter",
    "AdapterManifest",
    "AdapterhubError",
    "Audit",
    "BaseSpec",
    "Bill",
    "ConflictError",
    "ContentMatches",
    "Conversion",
    "ConvertedModel",
    "Demand",
    "DescribeResult",
    "Difference",
    "Entry",
    "EvaluationResult",
    "Finding",
    "FormatError",
    "Generation",
    "Identity",
    "Inputs",
    "InstalledFormat",
    "IntegrityError",
    "Lineage",
    "LocalIOError",
    "LossReport",
    "MergeReport",
    "MergeResult",
    "MissingExtraError",
    "ModelMergeReport",
    "NotFoundError",
    "NotUnderstoodError",
    "OutputExistsError",
    "ParameterError",
    "Policy",
    "PreparedVersion",
    "Problem",
    "PullResult",
    "PushResult",
    "Ref",
    "RefusedError",
    "Registry",
    "RemoteError",
    "Report",
    "RestoreResult",
    "Scan",
    "Selection",
    "Signature",
    "StoppedError",
    "TensorLoss",
    "TrainConfig",
    "TrainingResult",
    "UsageError",
    "Verdict",
    "Verification",
    "VerifiedAttestation",
    "Version",
    "VersionDocument",
    "VersionRow",
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
    "merge_into",
    "open_trainer",
    "pull",
    "push",
    "read_base",
    "resolve",
    "scan",
    "sign",
    "sign_checkpoint",
    "train",
    "validate",
    "verify",
]  # fmt: skip

_MODULES = {
    "adapterhub.analysis.diff_result": ("Difference",),
    "adapterhub.checks.report": (
        "Problem",
        "Report",
        "Verdict",
    ),
    "adapterhub.evaluation.results": ("EvaluationResult",),
    "adapterhub.generation": ("Generation",),
    "adapterhub.identity": ("Identity",),
    "adapterhub.index.queries": ("VersionRow",),
    "adapterhub.maintenance.findings": ("Finding",),
    "adapterhub.manifest.document": ("AdapterManifest",),
    "adapterhub.manifest.package_files": ("Selection",),
    "adapterhub.merging": (
        "ModelMergeReport",
        "MergeReport",
    ),
    "adapterhub.operations.attest": ("attest",),
    "adapterhub.operations.attest_predicates": ("Inputs",),
    "adapterhub.operations.audit": (
        "Audit",
        "audit",
        "sign_checkpoint",
    ),
    "adapterhub.operations.base_models": (
        "ConvertedModel",
        "convert_model",
        "read_base",
    ),
    "adapterhub.operations.bom": ("bom",),
    "adapterhub.operations.check": (
        "check",
        "validate",
    ),
    "adapterhub.operations.convert": ("convert",),
    "adapterhub.operations.describe": (
        "DescribeResult",
        "describe",
    ),
    "adapterhub.operations.diff": ("diff",),
    "adapterhub.operations.generate": ("generate",),
    "adapterhub.operations.load": (
        "Adapter",
        "load",
    ),
    "adapterhub.operations.local_registry": (
        "Registry",
        "Versions",
    ),
    "adapterhub.operations.merge": (
        "MergeResult",
        "merge",
    ),
    "adapterhub.operations.merge_into": ("merge_into",),
    "adapterhub.operations.pull": (
        "PullResult",
        "pull",
    ),
    "adapterhub.operations.push": ("push",),
    "adapterhub.operations.push_result": ("PushResult",),
    "adapterhub.operations.scan": (
        "Scan",
        "scan",
    ),
    "adapterhub.operations.sign": (
        "Signature",
        "Verification",
        "sign",
        "verify",
    ),
    "adapterhub.operations.signature_checks": ("Demand",),
    "adapterhub.operations.train": (
        "evaluate",
        "open_trainer",
        "train",
    ),
    "adapterhub.operations.workspace": ("Workspace",),
    "adapterhub.project.policy": ("Policy",),
    "adapterhub.ref": ("Ref",),
    "adapterhub.registry.adapter_recipe": ("Conversion",),
    "adapterhub.registry.content_search": ("ContentMatches",),
    "adapterhub.registry.lineage_graph": ("Lineage",),
    "adapterhub.registry.registry": ("Version",),
    "adapterhub.registry.shown_version": ("VersionDocument",),
    "adapterhub.registry.version_lookup": ("RestoreResult",),
    "adapterhub.serve.prepared_versions": ("PreparedVersion",),
    "adapterhub.serve.resolving": ("resolve",),
    "adapterhub.store.ref_log": ("Entry",),
    "adapterhub.training.events": ("TrainingResult",),
    "adapterhub.training.train_config": ("TrainConfig",),
    "adapterhub.trust.attestation": ("VerifiedAttestation",),
    "adapterhub.trust.cyclonedx_bom": ("Bill",),
    "adapterhub_converters.adapter": (
        "LossReport",
        "TensorLoss",
    ),
    "adapterhub_converters.bases": ("BaseSpec",),
    "adapterhub_converters.errors": (
        "AdapterhubError",
        "ConflictError",
        "FormatError",
        "IntegrityError",
        "LocalIOError",
        "MissingExtraError",
        "NotFoundError",
        "NotUnderstoodError",
        "OutputExistsError",
        "ParameterError",
        "RefusedError",
        "RemoteError",
        "StoppedError",
        "UsageError",
    ),
    "adapterhub_converters.formats": ("InstalledFormat",),
}

# Commands whose names mean something else in Python, and the functions that do the same.
__getattr__ = lazy_names(globals(), _MODULES, {"eval": "evaluate", "run": "generate", "rm": "Registry.remove"})


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
