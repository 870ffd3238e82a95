"""Adapters into a base: what was asked for, what is warned of, the merge itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.cli import inputs, output, recipes
from adapterhub.cli.progress import bytes_bar
from adapterhub_converters.errors import UsageError

from .options import Settings
from .views import fused

if TYPE_CHECKING:
    from adapterhub.merge import Options
    from adapterhub_converters.bases import BaseSpec


def weights_of(text: str | None, count: int) -> list[float]:
    """The numbers of --weights, one an adapter."""
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError("--weights", f"{text!r} is not numbers with commas between", "Write it like 0.7,-0.4") from error
    if len(weights) != count:
        raise UsageError("--weights", f"{output.plural(len(weights), 'weight')} for {output.plural(count, 'adapter')}")
    return weights


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def run(
    settings: Settings,
    found: Sequence[inputs.Source],
    weights: Sequence[float],
    places: tuple[str, str],
    into: Mapping[str, Any],
) -> None:
    """Merge into a base, or say what would be; `places` are the base and what to write."""
    from adapterhub.merge import prepared, read_base
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import convert

    base, out = inputs.weights(places[0], settings), Path(places[1])
    model = read_base(base)
    spec = model.spec
    asked = _asked(found, weights, base, spec, into)
    if base.is_dir() and not into["recipe_only"] and base.resolve() in out.resolve().parents:
        raise UsageError(str(out), f"lies in the base, {places[0]}, which would not be the same any more", "Name another place")
    if into["no_digest"] and not into["recipe_only"]:
        raise UsageError("--no-digest", "is for a recipe", "Add --recipe-only")
    gguf = base.is_dir() and out.suffix == ".gguf" and not into["recipe_only"]
    if not into["dry_run"] and not into["recipe_only"]:
        atomic.check_free(out, folder=not gguf and (base.is_dir() or bool(asked.shard_size)))
    adapters = [convert.read(source.path, base=spec) for source in found]
    merge = prepared(list(zip(adapters, weights, strict=True)), model, asked, gguf=gguf)
    warnings = (*_of_other_bases(found, spec, places[0]), *merge.report.warnings)
    for warning in warnings:
        output.say(output.one_line(f"warning: {warning}"))
    if into["recipe_only"] and not into["dry_run"]:
        recipes.keep(settings, merge, asked, recipes.Place(base, *places), digest=not into["no_digest"])
        return
    report = merge.report
    if not into["dry_run"]:
        with bytes_bar("merging") as progress:
            report = merge.write(out, progress)
    document_ = fused.document(dataclasses.replace(report, warnings=warnings))
    output.emit(document_, as_json=settings.as_json, text=lambda: fused.text(report))


def _of_other_bases(found: Sequence[inputs.Source], spec: BaseSpec, typed: str) -> list[str]:
    """A line for each adapter whose manifest pins a base of other names or shapes; a fine-tune of its base has the same."""
    from adapterhub.manifest.document import AdapterManifest

    lines = []
    for source in found:
        manifest = AdapterManifest.read(source.folder)
        pinned = manifest.base.fingerprint if manifest else None
        if manifest and spec.fingerprint and pinned not in (None, spec.fingerprint):
            trained_on = manifest.base.repo or f"the base {str(pinned)[:19]}"
            lines.append(
                f"{source.where} was trained on {trained_on}, and {typed} has tensors of other names or shapes. "
                f"`adapterhub validate {source.where} --base {typed}` says more"
            )
    return lines


def _asked(
    found: Sequence[inputs.Source], weights: Sequence[float], base: Path, spec: BaseSpec, into: Mapping[str, Any]
) -> Options:
    from adapterhub.merge import Options

    size = into["shard_size"]
    return Options(
        dtype=into["dtype"],
        requantize=into["requantize"],
        shard_size=_bytes(size) if size else None,
        dequantize=into["dequantize"],
        as_trained=into["onto"] == "as-trained",
        trained_in=trained_in(found),
        force=into["force"],
        lineage=_lineage(found, weights, base, spec),
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    unit += "B" if unit in ("K", "M", "G", "T") else ""
    if not match or not (count := int(float(match[1]) * _UNITS[unit])):
        raise UsageError("--shard-size", f"{text!r} is no size", "Write it like 5GB or 500MB")
    return count


def trained_in(found: Sequence[inputs.Source]) -> str | None:
    """The quantization that all adapters saw in training, by their manifests; None when none or more than one is recorded."""
    from adapterhub.manifest.document import AdapterManifest

    said = {manifest.base.quantization if (manifest := AdapterManifest.read(source.folder)) else None for source in found}
    return said.pop() if len(said) == 1 else None


def _lineage(found: Sequence[inputs.Source], weights: Sequence[float], base: Path, spec: BaseSpec) -> dict[str, Any]:
    parents = [inputs.parent(source, weight) for source, weight in zip(found, weights, strict=True)]
    known = {"repo": spec.repo, "revision": spec.revision, "fingerprint": spec.fingerprint}
    return {
        "base": known if spec.repo else {**known, "name": base.resolve().name},
        "adapters": [
            {"digest": parent.digest, **({"ref": parent.ref} if parent.ref else {}), "weight": parent.weight}
            for parent in parents
        ],
    }
