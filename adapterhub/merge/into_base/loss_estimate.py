"""What a merge would lose, said or refused before it is written; and the weights as training saw them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapterhub_converters.errors import RefusedError, refused

from .edits import Edit
from .measure import Change, Trained, measured
from .nf4 import ThroughNF4, sampled
from .nf4_writer import ROUTERS, is_linear
from .options import NF4, Options
from .output_files import Made, OutFile, Run
from .read_folder import CONV1D, Folder
from .tensor_io import Opened, Source, Stored, kind

LEAST_KEPT = 0.9
"""Of a module's change: less is refused on a quantized target, and warned about on one in 16 bits."""


def changes_of(
    files: Sequence[OutFile], edits: Mapping[str, Sequence[Edit]], options: Options, own: Mapping[str, Source] | None = None
) -> dict[str, Change]:
    """What becomes of each tensor that is changed; RefusedError when too little of the adapter would come through."""
    run, trained = Run(None, 0), _trained(options)
    with Opened() as opened:
        made = [part for file in files for part in file.parts if isinstance(part, Made) and edits.get(part.name)]
        changes = {}
        for part in made:
            original = (own or {}).get(part.name, part.source)
            in_floats = isinstance(original, Stored) and not original.kind.quantized
            changes[part.name] = measured(part, original, opened, run, trained if in_floats else None)
    lost = {name: change.kept for name, change in changes.items() if change.quantized and _is_lost(change)}
    if lost and not options.force:
        lines = [
            f"{name}: {kept:.1%} of the adapter's change would be kept" for name, kept in sorted(lost.items(), key=_second)
        ]
        way = "--dequantize in place of --requantize" if options.requantize == NF4 else "--dtype bf16"
        hint = f"Merge into 16 bits ({way}), or into the full-precision model; --force writes it all the same"
        raise refused("quantized", lines, hint)
    return changes


def _second(item: tuple[str, float | None]) -> float:
    return item[1] or 0.0


def _is_lost(change: Change) -> bool:
    return change.kept is not None and change.kept + change.doubt < LEAST_KEPT


def _trained(options: Options) -> Trained | None:
    """What training saw, as far as it is known: a base in floats is compared with NF4 only."""
    return Trained(is_linear, sampled) if options.trained_in == "nf4" else None


def as_trained(folder: Folder, options: Options) -> dict[str, Source]:
    """Every linear layer's weight as training in NF4 saw it; RefusedError when it isn't known what training saw."""
    if options.trained_in != "nf4":
        what = f"training saw the base in {options.trained_in}" if options.trained_in else "no quantization is recorded"
        raise RefusedError("--onto as-trained", f"{what}, and only nf4 is known here", "Leave it out")
    if folder.method:
        raise RefusedError("--onto as-trained", f"the base is {folder.method} already", "Leave it out: it is what it is")
    if folder.spec.model_type in CONV1D:
        raise RefusedError("--onto as-trained", f"{folder.spec.model_type} stores its weights transposed", "Leave it out")
    found: dict[str, Source] = {}
    for name, weight in folder.weights.items():
        form = kind(weight.dtype)
        if name.endswith(ROUTERS):
            raise RefusedError(name, "a router: whether training saw it quantized isn't known", "Leave --onto out")
        if is_linear(name) and len(weight.shape) == 2 and form:
            found[name] = ThroughNF4(name, weight.source(), form)
    return found


def warnings(changes: Mapping[str, Change]) -> tuple[str, ...]:
    """What may not be what was meant, one line each."""
    lost = [name for name, change in changes.items() if _is_lost(change)]
    if lost:
        worst = min(lost, key=lambda name: changes[name].kept or 0.0)
        kept = f"of the adapter's change in {worst} {changes[worst].kept:.0%} survives rounding"
        return (f"{kept}, less than {LEAST_KEPT:.0%} in {len(lost)} of {len(changes)} tensors",)
    if changes and all(change.relative is None for change in changes.values()):
        return ("nothing changes in the rows that were looked at: was the adapter trained?",)
    return ()
