"""The packaging layer for LoRA adapters: describe, check, convert, version, merge and train them.

    import adapterhub as ah

    ah.check("./sql", base="./Qwen3-0.6B").ok

The public names are those of `__all__`; docs/python.md shows them at work. Each is imported when it is first used, so that
`import adapterhub` loads neither numpy nor anything else.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adapterhub.version import __version__ as __version__

if TYPE_CHECKING:
    from adapterhub.api import Adapter as Adapter
    from adapterhub.api import Registry as Registry
    from adapterhub.api import Versions as Versions
    from adapterhub.api import check as check
    from adapterhub.api import convert as convert
    from adapterhub.api import evaluate as evaluate
    from adapterhub.api import load as load
    from adapterhub.api import merge as merge
    from adapterhub.api import pull as pull
    from adapterhub.api import push as push
    from adapterhub.api import train as train
    from adapterhub.check.report import Problem as Problem
    from adapterhub.check.report import Report as Report
    from adapterhub.merging import Combined as Combined
    from adapterhub.project.policy import Policy as Policy
    from adapterhub.ref import Ref as Ref
    from adapterhub.registry.registry import Version as Version
    from adapterhub.sharing import Pulled as Pulled
    from adapterhub.sharing import Sent as Sent
    from adapterhub.workspace import Workspace as Workspace
    from adapterhub_converters.adapter import LossReport as LossReport
    from adapterhub_converters.errors import AdapterhubError as AdapterhubError

__all__ = [
    "Adapter", "AdapterhubError", "Combined", "LossReport", "Policy", "Problem", "Pulled", "Ref", "Registry", "Report", "Sent",
    "Version", "Versions", "Workspace", "check", "convert", "evaluate", "load", "merge", "pull", "push", "train",
]  # fmt: skip

_MODULES = {
    "adapterhub.api": ("Adapter", "Registry", "Versions", "convert", "evaluate", "load", "pull", "push"),
    "adapterhub.check.report": ("Problem", "Report"),
    "adapterhub.merging": ("Combined",),
    "adapterhub.project.policy": ("Policy",),
    "adapterhub.ref": ("Ref",),
    "adapterhub.registry.registry": ("Version",),
    "adapterhub.sharing": ("Pulled", "Sent"),
    "adapterhub.workspace": ("Workspace",),
    "adapterhub_converters.adapter": ("LossReport",),
    "adapterhub_converters.errors": ("AdapterhubError",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}
_ALSO_PACKAGES = ("check", "merge", "train")


def __getattr__(name: str) -> Any:
    if name in _ALSO_PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Verb(ModuleType):
    """A package of ours whose name is also a verb: calling it calls the function of that name in `adapterhub.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        function = getattr(importlib.import_module("adapterhub.api"), self.__name__.rpartition(".")[2])
        return function(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a package to the name in its parent, which is how it becomes callable.
        if name in _ALSO_PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
