"""Check that a base is the one an adapter was trained on, by the facts that the adapter's `adapter.json` pins.

Shapes cannot tell Llama 3 from 3.1, or an instruction-tuned model from its base: digests can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.manifest import declarations
from adapterhub.manifest.base_name import base_name
from adapterhub.manifest.card import base_repo
from adapterhub.manifest.document import BaseInfo
from adapterhub_converters.adapter_files import ADAPTER_JSON, ADAPTER_TOML, determines_function
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft

from .contents import Contents
from .report import Problem

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

# Shapes settle these, and a GGUF base may lack them.
_SHAPES = {
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "tie_word_embeddings",
    "max_position_embeddings",
}


def identity_problems(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Yield differences between a base and the one that the adapter's manifest pins."""
    manifest = contents.manifest()
    pinned = manifest.base if manifest else BaseInfo()
    yield from _name_problems(contents, base, pinned)
    if manifest is None:
        return
    if not pinned.fingerprint:
        message = "adapter.json pins no base; identity was not compared"
        yield Problem("unpinned", ADAPTER_JSON, "base", message, "Publish it with its base")
        return
    if base.fingerprint and not base.has_fingerprint(pinned.fingerprint):
        message = f"trained on {_short(pinned.fingerprint)}, this base is {_short(base.fingerprint)}"
        hint = "Use the base it was trained on, or train again"
        yield Problem("base-differs", ADAPTER_JSON, "base.fingerprint", message, hint, pinned.fingerprint, base.fingerprint)
    for code, key, recorded, actual in (
        ("tokenizer-differs", "tokenizer_digest", pinned.tokenizer_digest, base.tokenizer_digest),
        ("template-differs", "chat_template_digest", pinned.chat_template_digest, base.chat_template_digest),
    ):
        if recorded and actual and recorded != actual:
            message = f"trained with {_short(recorded)}, here {_short(actual)}"
            yield Problem(code, ADAPTER_JSON, f"base.{key}", message, "", recorded, actual)
    yield from _number_problems(pinned.config, base.config)


def changed_files(contents: Contents) -> Iterator[Problem]:
    """Yield files whose bytes differ from those recorded in adapter.json: an error for weights and config, else a note."""
    folder, manifest = contents.folder, contents.manifest()
    for entry in manifest.files if manifest else ():
        path = folder / entry.path
        if entry.path == ADAPTER_TOML:
            continue
        code, hint = "files-edited", ""
        if determines_function(entry.path):
            code = "files-changed"
            hint = "Fetch it again, or describe the folder without adapter.json, whose training record is about other weights"
        if entry.path == peft.CONFIG:
            hint = "Undo the edit, or fetch the file again: the training record in adapter.json then stays"
        if not path.is_file():
            yield Problem(code, entry.path, "", "adapter.json names it, but it is missing", hint)
        # The size first: it is free, and a digest reads the file.
        elif path.stat().st_size != entry.size or contents.digest(path) != entry.digest:
            message = f"adapter.json names {_short(entry.digest)} with {entry.size} bytes; this is another file"
            yield Problem(code, entry.path, "", message, hint)


def _number_problems(pinned: Mapping[str, Any], actual: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield numbers of the config that change the function and differ."""
    for key in sorted(set(pinned) & set(actual) - _SHAPES):
        if not _same_number(pinned[key], actual[key]):
            message = f"trained with {pinned[key]}, here {actual[key]}"
            yield Problem(
                "numerics-differ", ADAPTER_JSON, f"base.config.{key}", message, "", str(pinned[key]), str(actual[key])
            )


def _same_number(a: Any, b: Any) -> bool:
    # A GGUF stores its numbers in 32 bits: 1e-05 comes back as 9.99999974e-06.
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    return bool(a == b)


def _name_problems(contents: Contents, base: BaseSpec, pinned: BaseInfo) -> Iterator[Problem]:
    """Yield a difference between the name of the base and the one that the adapter was trained on."""
    # A path on the machine that trained it may at least end in the name.
    trained = _recorded_name(contents, pinned) or contents.config.get("base_model_name_or_path")
    if isinstance(trained, str) and trained and base.repo and Path(trained).name != Path(base.repo).name:
        message = f"trained on {trained}, but this base is named {base.repo}"
        yield Problem("base-name-differs", "", base.source, message, "", trained, base.repo)


def base_name_problems(contents: Contents, base: BaseSpec | None) -> Iterator[Problem]:
    """Yield that no config, card, record or base names the base of a PEFT folder, or that its name is a folder here.

    trl writes the path that it was given, and `models/llama`
    looks like a name on the Hub.
    """
    if contents.format != "peft" or contents.unread is not None:
        return
    configured, manifest = contents.config.get("base_model_name_or_path"), contents.manifest()
    name = _recorded_name(contents, manifest.base if manifest else BaseInfo(), base)
    if name is not None and name == configured and Path(name).is_dir():
        message = f"{name} is a folder here, and would be recorded as a name on the Hub"
        in_card = base_repo(contents.card())
        hint = f"Write its name on its hub{f', like {in_card} of the card' if in_card and in_card != name else ''}"
        yield Problem("local-base-name", peft.CONFIG, "base_model_name_or_path", message, hint)
    if name is None:
        message = (
            f"{configured[:80]} is no name on a hub, and" if isinstance(configured, str) and configured else "missing, and"
        )
        hint = f"Write it there, or as base_model in the card, or as base.repo in {ADAPTER_TOML}"
        yield Problem("no-base-name", peft.CONFIG, "base_model_name_or_path", f"{message} nothing else names the base", hint)


def _recorded_name(contents: Contents, pinned: BaseInfo, base: BaseSpec | None = None) -> str | None:
    """Return the name that a push records for the base of an adapter."""
    declared: object = None
    with suppress(AdapterhubError):  # of a malformed adapter.toml, which a push reports
        declared = declarations.read_declared(contents.folder).get("base")
    return base_name(
        declared=declared.get("repo") if isinstance(declared, Mapping) else None,
        recorded=pinned.repo,
        configured=contents.adapter.meta.base_model if contents.adapter else contents.config.get("base_model_name_or_path"),
        in_card=base_repo(contents.card()),
        of_base=base.repo if base else None,
    )


def _short(digest: object) -> str:
    return str(digest)[:19]
