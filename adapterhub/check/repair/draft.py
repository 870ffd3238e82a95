"""An adapter while it is mended: its config as text has it, its tensors under the names they get."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError
from adapterhub_converters.formats import FORMATS, peft, pickles, raw


@dataclass(frozen=True, slots=True)
class Mend:
    """What was mended: `code` is that of the problem of `validate` where it has one."""

    code: str
    what: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """What may be wrong and cannot be known; `do` is the edit or command that would mend it."""

    code: str
    what: str
    do: str


@dataclass
class State:
    """What is mended step by step. `names` maps the name a tensor gets to that in its file; what is not in it goes."""

    folder: Path | None
    """What the other files are copied from; None for a lone file."""
    config: dict[str, Any]
    names: dict[str, str]
    files: dict[str, SafetensorsFile]
    """Name in its file to the open file."""
    metadata: dict[str, str]
    lone: bool = False
    mends: list[Mend] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)

    def mended(self, code: str, what: str) -> None:
        """Note what was done."""
        self.mends.append(Mend(code, what))

    def proposed(self, code: str, what: str, do: str) -> None:
        """Note what might be done."""
        self.proposals.append(Proposal(code, what, do))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor that gets this name."""
        key = self.names[name]
        return self.files[key].tensors[key].shape

    def pairs(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Module path to its parts' shapes, for what is a delta by its name."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in self.names:
            kind, target, part = peft.classify(name)
            if kind == "pair":
                found.setdefault(target, {})[part] = self.shape(name)
        return found

    @property
    def retensored(self) -> bool:
        """Whether the weights have to be written anew."""
        return self.lone or any(name != key for name, key in self.names.items()) or len(self.names) != len(self.files)


@contextlib.contextmanager
def opened(path: Path, *, alpha: float | None, rslora: bool) -> Iterator[State]:
    """The state of a PEFT folder, or of a lone state dict that becomes one."""
    if path.is_file() and path.name == peft.WEIGHTS and (path.parent / peft.CONFIG).is_file():
        path = path.parent
    _check_kind(path)
    folder = path if path.is_dir() else None
    paths = peft.weight_files(path) if folder else [path]
    with contextlib.ExitStack() as stack:
        files: dict[str, SafetensorsFile] = {}
        metadata: dict[str, str] = {}
        for item in paths:
            file = stack.enter_context(SafetensorsFile(item))
            files.update(dict.fromkeys(file.tensors, file))
            metadata = dict(file.header.metadata)
        config = _config(path, metadata, alpha, rslora=rslora)
        lone = not (folder and (folder / peft.CONFIG).is_file())
        state = State(folder, config, {key: key for key in files}, files, metadata, lone)
        if lone:
            state.mended("lone-state-dict", f"{paths[0].name} is a folder of its own now, with {peft.CONFIG}")
        yield state


def _check_kind(path: Path) -> None:
    if path.is_file() and path.suffix != ".safetensors":
        pickles.refuse(path)
        raise RefusedError(str(path), "only PEFT's files are mended", "`adapterhub convert --to peft` makes them of it")
    if path.is_dir() and FORMATS["mlx"].sniff(path):
        raise RefusedError(str(path), "an MLX adapter, and only PEFT's are mended", "`adapterhub convert --to peft` makes one")
    if path.is_dir() and not any((path / name).is_file() for name in (peft.CONFIG, peft.WEIGHTS, peft.INDEX)):
        raise NotFoundError(str(path), f"no PEFT adapter: neither {peft.CONFIG} nor {peft.WEIGHTS}", peft.nested(path))


def _config(path: Path, metadata: dict[str, str], alpha: float | None, *, rslora: bool) -> dict[str, Any]:
    beside = path / peft.CONFIG
    text = json_file.read_text(beside) if beside.is_file() else metadata.pop(raw.CONFIG_KEY, None)
    metadata.pop(raw.METADATA_KEY, None)
    if text is not None:
        if alpha is not None or rslora:
            raise UsageError(str(path), "it has a config that says its alpha", "Leave out --alpha and --rslora")
        return json_file.parse_object(text, str(beside))
    if alpha is None:
        reason = "nothing says its alpha, and the scale depends on it"
        raise RefusedError(str(path), reason, "Pass --alpha N, and --rslora if it was trained with it")
    number = int(alpha) if float(alpha).is_integer() else alpha
    return {"peft_type": "LORA", "lora_alpha": number, "use_rslora": rslora, "inference_mode": True}
