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
    from adapterhub.api import Adapter, check, convert, describe, load, merge, pull, push
    from adapterhub.base_models import ConvertedModel, convert_model, read_base
    from adapterhub.checks.report import Problem, Report
    from adapterhub.combining import Combined
    from adapterhub.generation import Generated
    from adapterhub.learning import evaluate, train
    from adapterhub.local_registry import Registry, Versions
    from adapterhub.project.policy import Policy
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Version
    from adapterhub.running import generate
    from adapterhub.sharing import Pulled, Sent
    from adapterhub.workspace import Workspace
    from adapterhub_converters.adapter import LossReport
    from adapterhub_converters.errors import AdapterhubError

__all__ = [
    "Adapter", "AdapterhubError", "Combined", "ConvertedModel", "Generated", "LossReport", "Policy", "Problem", "Pulled",
    "Ref", "Registry", "Report", "Sent", "Version", "Versions", "Workspace", "check", "convert", "convert_model",
    "describe", "evaluate", "generate", "load", "merge", "pull", "push", "read_base", "train",
]  # fmt: skip

_MODULES = {
    "adapterhub.api": ("Adapter", "check", "convert", "describe", "load", "merge", "pull", "push"),
    "adapterhub.base_models": ("ConvertedModel", "convert_model", "read_base"),
    "adapterhub.checks.report": ("Problem", "Report"),
    "adapterhub.combining": ("Combined",),
    "adapterhub.generation": ("Generated",),
    "adapterhub.learning": ("evaluate", "train"),
    "adapterhub.local_registry": ("Registry", "Versions"),
    "adapterhub.project.policy": ("Policy",),
    "adapterhub.ref": ("Ref",),
    "adapterhub.registry.registry": ("Version",),
    "adapterhub.running": ("generate",),
    "adapterhub.sharing": ("Pulled", "Sent"),
    "adapterhub.workspace": ("Workspace",),
    "adapterhub_converters.adapter": ("LossReport",),
    "adapterhub_converters.errors": ("AdapterhubError",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
