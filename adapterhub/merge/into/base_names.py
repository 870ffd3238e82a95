"""From the names of an adapter to the tensors of a Hugging Face folder, and the refusals where there is none that fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from adapterhub_converters import names
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.architecture import Architecture
from adapterhub_converters.errors import RefusedError

from .hf_base import Folder


def architecture_of(folder: Folder) -> Architecture | None:
    """What is known of the class of a base, if it is."""
    try:
        return names.by_class(folder.spec.architecture, folder.spec.where)
    except RefusedError:
        return None


def absent(target: str, where: str) -> RefusedError:
    """The base at `where` has no such module or parameter."""
    return RefusedError(target, f"not in the base {where}", "Is this the model the adapter was trained on?")


def check_shape(target: str, name: str, shape: tuple[int, ...], have: tuple[int, ...]) -> None:
    """RefusedError where the base's tensor `name` has another shape than the weight that the adapter changes."""
    if tuple(shape) != have:
        hint = "The adapter was trained after the vocabulary was resized" if have[1:] == tuple(shape)[1:] else ""
        raise RefusedError(target, f"changes a weight of shape {tuple(shape)}, the base's {name} is {have}", hint)


class BaseNames:
    """From an adapter's names to the base's: the same, or one leading component more or less, the same for all.

    `GPT2LMHeadModel` calls its blocks `transformer.h…`, and its published checkpoint `h…`; transformers adds what is
    missing when it loads (`base_model_prefix`), and so the adapter has it.
    """

    def __init__(self, folder: Folder, adapter: Adapter, alias: Mapping[str, str]) -> None:
        tensors = folder.weights
        self._tensors = tensors
        self._where = folder.spec.where
        self._alias = alias
        stems = {f"{target}.weight" for target in (*adapter.deltas, *adapter.rows)} | set(adapter.replaced)
        missing = sorted(stem for stem in stems if stem not in tensors and stem not in alias)
        self._rename = self._dialect(missing) if missing else {}
        self.notes = sorted({f"{old}… in the adapter is {new}… in the base" for old, new in self._prefixes(self._rename)})

    def _dialect(self, missing: list[str]) -> dict[str, str]:
        first = missing[0]
        heads = {first.partition(".")[0] + "."}
        added = {name.removesuffix(first) for name in self._tensors if name.endswith("." + first)}
        ways = [{name: name.partition(".")[2] for name in missing}] if all(n.startswith(tuple(heads)) for n in missing) else []
        ways += [{name: prefix + name for name in missing} for prefix in sorted(added)]
        fitting = [way for way in ways if all(new in self._tensors for new in way.values())]
        if len(fitting) > 1:
            raise RefusedError(first, f"could be {' or '.join(way[first] for way in fitting)} in the base {self._where}")
        if not fitting:
            raise absent(first, self._where)
        return fitting[0]

    @staticmethod
    def _prefixes(rename: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        for old, new in rename.items():
            longer = max(old, new, key=len)
            prefix = longer[: len(longer) - min(len(old), len(new))]
            yield (prefix, "") if len(old) > len(new) else ("", prefix)

    def parameter(self, name: str, *, why: str = "not in the base") -> str:
        """The base's name of a parameter."""
        if name in self._tensors:
            return name
        if name in self._alias:
            return self._alias[name]
        stem = name.rpartition(".")[0] + ".weight"
        new = self._rename.get(name) or self._rename.get(stem, stem).rpartition(".")[0] + "." + name.rpartition(".")[2]
        if new not in self._tensors:
            raise RefusedError(name.rpartition(".")[0], why)
        return new
