"""The prompt of an adapter: the chat template that it was trained with, the template's options, and its date.

An adapter answers as it was trained only if it is asked in the same form. A folder has its template in a file and the rest in
the record of its training; a GGUF has all of it in its metadata, under names of ours: Ollama would take a template under
llama.cpp's name for that of the base.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import keyword
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

from .adapter_files import ADAPTER_JSON
from .containers import json_file
from .errors import FormatError, RefusedError

if TYPE_CHECKING:
    from .containers.gguf_file import GGUFHeader
    from .containers.gguf_types import MetadataValue

FILE = "chat_template.jinja"
"""The name of the template in the folder of an adapter, as in that of a model."""
CLOCK = "strftime_now"
"""The function by which a template asks for the date."""
GGUF_KEY = "adapterhub.chat_template"
"""The key of the template in a GGUF; those of its options and its date begin with it."""
_TEMPLATE, _OPTIONS, _DATE = GGUF_KEY, f"{GGUF_KEY}.options", f"{GGUF_KEY}.date"
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize", CLOCK}
)
"""Variables that a request sets, or that decide how it is rendered: no option of a template."""
_DIRECTIVE = safe_regex.Pattern(r"%-?[aAbBcdDeFHIjmMpSTuUVwWxXyY]")
_CONSTANTS = frozenset({"true", "false", "none"})


@dataclass(frozen=True)
class TrainedPrompt:
    """The form in which an adapter was trained to be asked; false if it is that of its base.

    Attributes:
        template: The text of its own chat template; None for that of the base.
        options: The variables of the template that were set, by name.
        date: The ISO date that a template with a clock wrote; None for the day of the request.
    """

    template: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    date: str | None = None

    @classmethod
    def read(cls, path: Path, record: Mapping[str, Any] | None = None, header: GGUFHeader | None = None) -> TrainedPrompt:
        """Return the prompt of the adapter at `path`, a folder or a file, as `adapter_files.resolve_adapter` returns it.

        Args:
            path: The adapter.
            record: Its adapter.json, empty if there is none; None to read it.
            header: Its header, if it is a GGUF; None to read it.

        Raises:
            RefusedError: The template is a link that leads out of the folder.
        """
        folder = path if path.is_dir() else path.parent
        if path.suffix == ".gguf" and path.is_file():
            prompt = cls._from_gguf(path, header)
            # Next to a single file, a template may be that of anything else in the folder.
            if prompt or not (folder / ADAPTER_JSON).is_file():
                return prompt
        template = _read_template(folder) if (folder / FILE).is_file() else None
        if record is None:
            record = json_file.read_object(folder / ADAPTER_JSON) if (folder / ADAPTER_JSON).is_file() else {}
        data = _table(_table(_table(record, "training"), "config"), "data")
        return cls(template, _valid_options(data.get("template_options")), valid_date(data.get("date")))

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> TrainedPrompt:
        """Return the prompt that `dataclasses.asdict` wrote as JSON."""
        return cls(document["template"], tuple((name, value) for name, value in document["options"]), document["date"])

    @classmethod
    def _from_gguf(cls, path: Path, header: GGUFHeader | None) -> TrainedPrompt:
        if header is None:
            from .containers.gguf_file import GGUFFile  # late, like other readers

            with GGUFFile(path) as file:
                header = file.header
        metadata = header.metadata
        template, options = metadata.get(_TEMPLATE), metadata.get(_OPTIONS)
        try:
            pairs = json_file.parse(options, f"{path}: {_OPTIONS}") if isinstance(options, str) else None
        except FormatError:
            pairs = None
        return cls(template if isinstance(template, str) else None, _valid_options(pairs), valid_date(metadata.get(_DATE)))

    def metadata(self) -> dict[str, MetadataValue]:
        """Return the entries of a GGUF from which `read` returns this prompt."""
        from .containers.gguf_types import string_value

        options = json.dumps([list(pair) for pair in self.options]) if self.options else None
        texts = {_TEMPLATE: self.template, _OPTIONS: options, _DATE: self.date}
        return {key: string_value(text) for key, text in texts.items() if text is not None}

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the template besides the conversation; the date is that of the function that writes it."""
        return {**dict(self.options), **({CLOCK: self.date} if self.date else {})}

    def beside_base(self, template_digest: str | None) -> TrainedPrompt:
        """Return the prompt without a template that is that of its base, which trainers store with an adapter.

        Args:
            template_digest: The SHA-256 of the base's template, as `sha256:` and hexadecimal digits; None if it is not known.
        """
        is_of_base = self.template is not None and _digest(self.template) == template_digest
        return replace(self, template=None) if is_of_base else self

    def as_template(self, base_template: str | None = None) -> str | None:
        """Return a template that writes this prompt by itself, in programs that know neither its options nor its date.

        An option that such a program is told still replaces that of the training.

        Args:
            base_template: The template of the base, which the prompt may be about; None if it is not known, or there is none.

        Returns:
            The template; None if neither the adapter has one nor the base.
        """
        template = base_template if self.template is None else self.template
        if template is None:
            return None
        # In a template, only a variable of such a name can be read.
        names = [name for name, _ in self.options if name.isascii() and name.isidentifier() and not keyword.iskeyword(name)]
        settings = {name: dict(self.options)[name] for name in names if name not in _CONSTANTS}
        lines = [
            f"{{%- if {name} is not defined %}}{{%- set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{%- endif %}}\n"
            for name, value in settings.items()
        ]
        return "".join(lines) + _with_date(template, self.date)

    def write_template(self, folder: Path) -> bool:
        """Write the prompt as the chat template of a folder without one; return whether all of the prompt is in the folder."""
        template = self.as_template()
        if template is not None and not (folder / FILE).exists():
            json_file.write_text(folder / FILE, template)
        return template is not None or not self

    def with_options(self, options: Mapping[str, Any]) -> TrainedPrompt:
        """Return the prompt for a request with options of its own, which count before those of the training."""
        return replace(self, options=tuple({**dict(self.options), **options}.items())) if options else self

    def __bool__(self) -> bool:
        return self.template is not None or bool(self.options) or self.date is not None


def common_prompt(prompts: Iterable[TrainedPrompt], template_digest: str | None) -> TrainedPrompt | None:
    """Return the prompt that adapters of one base have in common; None if they were trained with different ones.

    Args:
        prompts: Of each adapter.
        template_digest: As for `TrainedPrompt.beside_base`.
    """
    distinct = list(dict.fromkeys(prompt.beside_base(template_digest) for prompt in prompts)) or [PROMPT_OF_BASE]
    return distinct[0] if len(distinct) == 1 else None


PROMPT_OF_BASE = TrainedPrompt()
"""The prompt of an adapter that was trained by the template of its base, without options or a date."""


def _read_template(folder: Path) -> str:
    # A clone may bring a link to any text of its reader, which a conversion would copy into what is published.
    path, real = folder / FILE, folder.resolve()
    target = path.resolve()
    # huggingface_hub's cache: snapshots/<revision>/chat_template.jinja -> ../../blobs/<digest>.
    is_cached = target.parent.name == "blobs" and real.is_relative_to(target.parent.parent / "snapshots")
    if path.is_symlink() and not target.is_relative_to(real) and not is_cached:
        problem = "a link that leads out of the adapter"
        raise RefusedError(str(path), problem, "Replace it with the file itself", code="not-a-regular-file")
    return json_file.read_text(path)


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _with_date(template: str, date: str | None) -> str:
    """Return a template that writes this ISO date instead of today's."""
    if date is None or CLOCK not in template:
        return template
    day = datetime.datetime.fromisoformat(date)
    parts = sorted({match.group() for match in _DIRECTIVE.finditer(template)})
    replacements = "".join(f" | replace('{part}', '{day.strftime(part)}')" for part in parts)
    return f"{{%- macro {CLOCK}(format) -%}}{{{{- format{replacements} -}}}}{{%- endmacro -%}}\n{template}"


def _table(value: Any, key: str) -> Mapping[str, Any]:
    inner = value.get(key) if isinstance(value, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _valid_options(pairs: Any) -> tuple[tuple[str, Any], ...]:
    """Return the options in a record; none if it is of another form, as the record of another trainer may be."""
    is_valid = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str | int | float | bool)
        for pair in pairs
    )
    return tuple((name, value) for name, value in pairs if name not in RESERVED) if is_valid else ()


def valid_date(value: Any) -> str | None:
    """Return an ISO date in its usual form; None for anything else."""
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        return None
