"""Copies of the base's weights that ride along, under a wrapper's name: gone where they are the base's own."""

from __future__ import annotations

from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.base_weights import BaseWeights

from .draft import Draft

_CODE = "copy"


def drop_copies(state: Draft, base: BaseSpec | None) -> None:
    """Drop each copy that equals the base's weight, byte for byte as training loaded it."""
    found = {name: parameter for name in state.names for kind, parameter, _ in (peft.classify(name),) if kind == "copy"}
    if not found:
        return
    if base is None or base.folder is None:
        for name in found:
            what = f"{name} is a copy of the base's weight, perhaps another one than the base's"
            state.proposed(_CODE, what, "`adapterhub fix --base BASE`, with its weights, drops it if it is the base's own")
        return
    with BaseWeights(base.folder) as weights:
        for name, parameter in found.items():
            _settle(state, weights, name, parameter)


def _settle(state: Draft, weights: BaseWeights, name: str, parameter: str) -> None:
    key = state.names[name]
    copy = state.files[key].tensor(key)
    try:
        own = weights.tensor(parameter)
    except RefusedError as error:
        state.proposed(_CODE, f"{name} is a copy of {parameter}, {error.what}", "Give the base it was trained on")
        return
    if own.shape == copy.shape and own.astype(copy.dtype).tobytes() == copy.tobytes():
        del state.names[name]
        state.mended(_CODE, f"{name} dropped: it is the base's own")
    else:
        what = f"{name} is another tensor than the base's: its vocabulary was resized, or it was trained"
        state.proposed(_CODE, what, f"Keep it and name its module in modules_to_save, or drop it: {parameter}")
