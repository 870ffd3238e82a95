"""Tell from the scheme alone whether a text is an address, and of which remote, so that a path or a ref imports no remote."""

from __future__ import annotations

# Modules below this package.
_HUB_MODULE = "hub.hub_repository"
_LAYOUT_MODULE = "layouts.layout_address"
_OBJECTS_MODULE = "objects.object_repository"
_OCI_MODULE = "oci.oci_repository"
_MODULES = {
    "az": _OBJECTS_MODULE,
    "file": _OBJECTS_MODULE,
    "gs": _OBJECTS_MODULE,
    "hf": _HUB_MODULE,
    "hub+http": _HUB_MODULE,
    "hub+https": _HUB_MODULE,
    "layout": _LAYOUT_MODULE,
    "oci": _OCI_MODULE,
    "oci+http": _OCI_MODULE,
    "oci+https": _OCI_MODULE,
    "s3": _OBJECTS_MODULE,
}
_SKOPEO_PREFIXES = ("oci:", "oci-archive:")  # image layouts, as skopeo writes them


def is_address(text: str) -> bool:
    """Return whether a text is an address rather than a ref or a path."""
    return bool(module_name(text))


def is_layout(text: str) -> bool:
    """Return whether a text is the address of an image layout on the local disk."""
    return module_name(text) == _LAYOUT_MODULE


def schemes() -> tuple[str, ...]:
    """Return all schemes."""
    return tuple(_MODULES)


def module_name(text: str) -> str:
    """Return the module for an address, below this package; empty for a text that is not one."""
    scheme, separator, _ = text.partition("://")
    if separator and scheme.lower() in _MODULES:
        return _MODULES[scheme.lower()]
    return _LAYOUT_MODULE if text.lower().startswith(_SKOPEO_PREFIXES) else ""
