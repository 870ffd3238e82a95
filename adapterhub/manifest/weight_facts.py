"""Facts of a manifest that follow from the weights, and the comparison of an adapter.json with them.

Shapes come from the header of the weights, so that 200 MB of weights do not take 200 MB of memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import AdaLora, Adapter, Hadamard, Kronecker, Vera
from adapterhub_converters.adapter_files import ADAPTER_JSON, resolve_adapter
from adapterhub_converters.errors import IntegrityError, NotUnderstoodError
from adapterhub_converters.formats import adapter_claims, peft
from adapterhub_converters.formats.adapter_claims import AdapterClaims
from adapterhub_converters.formats.candidate import Candidate

from .document import AdapterManifest, ModuleShape
from .folder_contents import FolderContents, Inspection

if TYPE_CHECKING:
    from adapterhub_converters.adapter import Delta

DERIVED = (
    "method", "r", "alpha", "rslora", "modules", "targets", "replaced", "dtype", "parameters", "format", "understood", "reason",
    "numbers",
)  # fmt: skip
"""Fields of a manifest that follow from the weights."""
WRONG_FACTS = "wrong-facts"
"""The code of the error for an adapter.json whose fields do not."""


def check_facts(recorded: AdapterManifest, inspected: Inspection, location: str, hint: str = "", *, folder: Path) -> None:
    """Raise IntegrityError if an adapter.json contradicts the weights, which are in `folder`."""
    adapter_format, adapter = inspected[:2]
    if recorded.understood is False and isinstance(adapter, Adapter):
        # Recorded by a version that did not know the kind: it has what the config claims.
        adapter = adapter_claims.read(resolve_adapter(folder), NotUnderstoodError(location, ""))
    older_facts = _older_weight_facts(adapter) if isinstance(adapter, Adapter) else {}
    for key, value in weight_facts(adapter, adapter_format).items():
        # The reason is worded by the version that wrote it.
        if key != "reason" and getattr(recorded, key) not in (value, older_facts.get(key, value)):
            problem = f'"{key}" is {_short(recorded.to_dict()[key])}, but the weights have {_short(value)}'
            raise IntegrityError(location, problem, hint, code=WRONG_FACTS)


def manifest_matching_weights(
    folder: Path, *, inspected: Inspection | None = None, location: str = ""
) -> AdapterManifest | None:
    """Return the adapter.json of a folder after comparing it with the headers of the weights; None if there is none.

    Raises:
        IntegrityError: It is not about these weights.
    """
    recorded = AdapterManifest.read(folder)
    if recorded is not None:
        check_facts_of_author(recorded, inspected or inspect_adapter(folder), location or str(folder), folder=folder)
    return recorded


def check_facts_of_author(recorded: AdapterManifest, inspected: Inspection, location: str, *, folder: Path) -> None:
    """Raise IntegrityError as `check_facts` does, with the hint for an adapter from somebody else."""
    check_facts(recorded, inspected, f"{location}: {ADAPTER_JSON}", "Get the adapter from its author again", folder=folder)


def _short(value: object) -> str:
    return json.dumps(value, default=dataclasses.asdict)[:60]


def inspect_contents(contents: FolderContents) -> Inspection:
    """Return what `inspect_adapter` does, without opening a PEFT adapter's files again."""
    return inspect_adapter(contents.folder, contents)


def inspect_adapter(folder: Path, contents: FolderContents | None = None) -> Inspection:
    """Return the format and the adapter of a folder; of a PEFT folder only the shapes, without the numbers in its tensors."""
    try:
        return _read_known_format(folder, contents)
    except NotUnderstoodError as error:
        # An unknown kind can still be packaged, described by what its config claims.
        adapter = adapter_claims.read(resolve_adapter(folder), error)
        return Inspection(adapter.format, adapter)


def _read_known_format(folder: Path, contents: FolderContents | None) -> Inspection:
    candidate = Candidate(folder, config=contents.texts.get(peft.CONFIG) if contents else None)
    if contents is not None and peft.sniff(candidate):
        weights = peft.weight_files(folder)
        if contents.headers.keys() >= set(weights):
            headers = {path: contents.headers[path] for path in weights}
            return Inspection("peft", peft.parse_shapes(contents.texts[peft.CONFIG], headers, location=str(folder)))
    if peft.sniff(candidate):
        return Inspection("peft", peft.read_shapes(candidate))
    from adapterhub_converters.formats import convert  # late: a PEFT adapter needs no other reader

    candidate = candidate.adapter
    # No fact depends on the order of rows.
    return Inspection(convert.sniff(candidate), *convert.read_unordered(candidate), candidate.gguf)


def weight_facts(adapter: Adapter | AdapterClaims, adapter_format: str) -> dict[str, Any]:
    """Return the fields listed in DERIVED, by name."""
    if isinstance(adapter, AdapterClaims):
        return _claims(adapter)
    names = {dtypes.name_of_elements(tensor) for tensor, _ in adapter.counted_tensors()}
    shapes = {id(delta): _shape(delta) for delta, _ in adapter.distinct_deltas}
    return {
        "method": _method(adapter),
        **_ranks({target: shapes[id(delta)] for target, delta in adapter.deltas.items()}),
        "rslora": any(delta.rslora for delta, _ in adapter.distinct_deltas),
        "targets": tuple(sorted({_last_name(target) for target in (*adapter.deltas, *adapter.tuned)})),
        "replaced": tuple(sorted([*adapter.replaced, *adapter.rows, *adapter.copies, *adapter.added])),
        "dtype": names.pop() if len(names) == 1 else "mixed",
        "parameters": adapter.parameters,
        "format": adapter_format,
        "understood": None,
        "reason": None,
        "numbers": dict(adapter.meta.numbers) or None,
    }


def _claims(adapter: AdapterClaims) -> dict[str, Any]:
    """Return the fields listed in DERIVED for an adapter that is not understood: what its config claims."""
    return {
        "method": adapter.method,
        "r": adapter.r,
        "alpha": None if adapter.alpha is None else _number(adapter.alpha),
        "rslora": False,
        "modules": {},
        "targets": adapter.targets,
        "replaced": (),
        "dtype": adapter.dtype,
        "parameters": adapter.parameters,
        "format": adapter.format,
        "understood": False,
        "reason": adapter.reason,
        "numbers": None,
    }


# The methods that are named after a kind of delta.
_METHODS: Mapping[type, str] = {AdaLora: "adalora", Hadamard: "loha", Kronecker: "lokr", Vera: "vera"}


def _method(adapter: Adapter) -> str:
    """Return `lora`, `dora`, `full` without a delta, or the name of another kind if all deltas are of that kind."""
    if adapter.meta.method:
        return adapter.meta.method
    kinds = {_METHODS.get(type(delta), "") for delta, _ in adapter.distinct_deltas}
    if len(kinds) == 1 and (name := kinds.pop()):
        return name
    dora = any(getattr(delta, "magnitude", None) is not None for delta, _ in adapter.distinct_deltas)
    return "dora" if dora else "lora" if adapter.deltas else "full"


def _last_name(target: str) -> str:
    """Return the last component of a path, with the one before it if it is a number: `to_out.0`."""
    prefix, _, last = target.rpartition(".")
    return f"{prefix.rpartition('.')[2]}.{last}" if last.isdecimal() else last


def _older_weight_facts(adapter: Adapter) -> dict[str, Any]:
    """Return what older versions recorded: they took every delta for LoRA, and a number for the name of a module."""
    targets = tuple(sorted({target.rpartition(".")[2] for target in adapter.deltas}))
    if not any(type(delta) in _METHODS for delta in adapter.deltas.values()):
        return {"targets": targets}
    return {
        "method": "lora",
        "targets": targets,
        **_ranks({target: (delta.r, delta.alpha) for target, delta in adapter.deltas.items()}),
    }


def _shape(delta: Delta) -> tuple[int | None, float | None]:
    """Return rank and alpha of a module: LoKr has neither if both its matrices are full, and VeRA always scales by 1."""
    if isinstance(delta, Kronecker):
        return (delta.rank, delta.alpha) if delta.rank else (None, None)
    return delta.r, None if isinstance(delta, Vera) else delta.alpha


def _ranks(shapes: Mapping[str, tuple[int | None, float | None]]) -> dict[str, Any]:
    """Return the rank and alpha of most modules (of two equally common pairs, the larger), and the modules that differ."""
    counts = Counter(shapes.values())
    # Ties are broken by value, so that the result does not depend on the order of the modules.
    shared = max(counts, key=lambda pair: (counts[pair], pair[0] or 0, pair[1] or 0), default=(None, None))
    r, alpha = shared
    modules = {
        target: ModuleShape(r_of_module, _number(alpha_of_module or 0))
        for target, (r_of_module, alpha_of_module) in sorted(item for item in shapes.items() if item[1] != shared)
        if r_of_module is not None
    }
    return {"r": r, "alpha": None if alpha is None else _number(alpha), "modules": modules}


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
