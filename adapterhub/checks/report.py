"""The report of a check: problems with stable codes, and a verdict for each runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from adapterhub_converters import display
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
ERROR, WARNING, NOTE = SEVERITIES

_Codes = dict[str, tuple[Severity, str]]  # code -> severity and meaning

_FILES: _Codes = {
    # Are the files well-formed?
    "no-adapter": (ERROR, "there is no adapter at a path, a ref or an address"),
    "malformed": (ERROR, "a file is truncated, malformed or hostile; nothing of it was used"),
    "missing-file": (ERROR, "a file that the format requires is missing"),
    "pickle": (ERROR, "the weights are a pickle, which can run code when it is loaded"),
    "stray-pickle": (WARNING, "there is a pickle next to the safetensors file; other programs may load it instead"),
    "whole-model": (ERROR, "a whole model where an adapter is expected"),
    "not-understood": (WARNING, "the kind of adapter is not known: only that its files are well-formed was checked"),
    "unsupported": (ERROR, "the adapter is of a known kind, but a part of it cannot be read as intended"),
    "unknown-key": (WARNING, "a key of the config that peft does not have and ignores, with a warning"),
    "needs-base": (ERROR, "the format cannot be read without the base model"),
    "order-unknown": (NOTE, "the order of some rows depends on the base: without it only shapes and values are checked"),
    "files-changed": (ERROR, "the weights or the config differ from those recorded in adapter.json"),
    "files-edited": (NOTE, "a file other than the weights and the config differs from the one recorded in adapter.json"),
    "not-packaged": (ERROR, "a push refuses a file: pickled weights, a link, a device"),
    "no-base-name": (WARNING, "neither the config, the card, adapter.json nor the base names the base on its hub"),
    "left-out": (NOTE, "files that are not part of an adapter, which a push leaves out"),
    # Do config and tensors agree with each other?
    "key-prefix": (ERROR, "tensors are not named `base_model.model.…`; peft would skip them silently"),
    "unknown-tensor": (ERROR, "a tensor of unknown kind"),
    "missing-half": (ERROR, "lora_A without its lora_B, or vice versa"),
    "not-a-matrix": (ERROR, "a factor does not have two dimensions"),
    "empty-tensor": (ERROR, "a tensor has no elements, as ZeRO-3 saves it when weights were not gathered"),
    "rank-differs": (ERROR, "lora_A and lora_B of a module have different ranks"),
    "rank-config": (ERROR, "the config and the tensors disagree on the rank; peft would refuse to load them"),
    "adapter-name": (WARNING, "the adapter's own name is in the names of its tensors, which peft loads and vLLM refuses"),
    "no-targets": (WARNING, "target_modules is missing: peft takes a default for the model type, or refuses the adapter"),
    "not-targeted": (ERROR, "a module has tensors, but the config does not target it: peft skips them silently"),
    "missing-tensor": (ERROR, "modules_to_save or trainable_token_indices names what the file lacks: peft raises KeyError"),
    "peft-refuses": (ERROR, "peft raises an error for this config, alone or on this base"),
    "part-shape": (ERROR, "a magnitude or bias does not have one element per output feature"),
    "no-magnitude": (ERROR, "use_dora is true, but a module has no magnitude vector"),
    "magnitude-flag": (ERROR, "there are magnitude vectors, but use_dora is not true; peft would skip them"),
    "bias-flag": (ERROR, "there is a lora_B.bias, but lora_bias is not true; peft would skip it"),
    "classifier": (ERROR, "X-LoRA: a layer of the classifier is missing, which peft draws anew, or has another shape"),
    "no-bias": (WARNING, "lora_bias is true, but a module has no lora_B.bias"),
    "token-rows": (ERROR, "trainable_token_indices and the saved rows differ in number"),
    "overwrites-base": (WARNING, "a whole tensor replaces the base's own, but modules_to_save does not name its module"),
    "not-floats": (ERROR, "a tensor's dtype is not one that adapters use"),
    "non-finite": (ERROR, "a tensor has a NaN or an infinity"),
    "does-nothing": (WARNING, "every lora_B is zero, or alpha is: the adapter changes nothing"),
    "pattern-overlap": (WARNING, "two patterns with different values match one module; peft loses their order"),
    "pattern-unused": (WARNING, "a pattern matches no module, probably a typo"),
    "old-experts": (WARNING, "experts as an earlier peft saved them, which peft 0.21 does not compute with"),
    "initial-adapter": (WARNING, "the initialization changed the base: correct only together with the initial adapter"),
    "scale-large": (NOTE, "alpha / r is above 64, which is rarely meant"),
    "local-base-name": (NOTE, "base_model_name_or_path is a path on the disk of the machine that trained it"),
    "image-model": (NOTE, "the family of image models that the adapter is for, and the program that saved it"),
}  # fmt: skip

# Does it fit the base?
_BASE: _Codes = {
    "base-without-weights": (NOTE, "the base has no weight files here: shapes are derived from its config, or not compared"),
    "base-incomplete": (NOTE, "a part of the base could not be read and was not compared"),
    "shape-unknown": (NOTE, "the base stores a module in a quantization whose logical shape is unknown"),
    "other-prefix": (ERROR, "the modules have a different prefix than the base's modules"),
    "headless-base": (NOTE, "the base was saved without its head; transformers corrects the prefixes"),
    "headless-adapter": (NOTE, "the adapter was trained on the model without its head: load the base with AutoModel"),
    "renamed-modules": (NOTE, "the base's files have older names; transformers renames the modules at load"),
    "new-head": (NOTE, "the base has no such head; the class of the task adds it, and the adapter contains its weights"),
    "no-such-module": (ERROR, "the adapter changes a module that the base does not have"),
    "base-shallower": (ERROR, "the adapter changes layers that the base does not have"),
    "base-deeper": (ERROR, "the base has layers that the adapter should cover but does not"),
    "uncovered-module": (WARNING, "target_modules names a module of the base that has no tensors"),
    "shape-mismatch": (ERROR, "the factors do not multiply to the shape of the base's weight"),
    "vocab-differs": (ERROR, "an embedding or output layer has a different number of tokens than the base"),
    "row-outside": (ERROR, "a replaced token row is outside the base's vocabulary"),
    "tied-weights": (WARNING, "only one of two tied tables is changed; runtimes disagree on what that means"),
    "does-not-fit": (ERROR, "the adapter cannot be read for this base"),
}  # fmt: skip

# Is it the base that was trained on?
_IDENTITY: _Codes = {
    "unpinned": (NOTE, "adapter.json does not pin the base that the adapter was trained on"),
    "base-differs": (ERROR, "names and shapes of the base differ from those pinned in adapter.json"),
    "numerics-differ": (ERROR, "a number that changes the function (rope, norm, heads) differs from adapter.json"),
    "base-name-differs": (WARNING, "the base has a different name than the one the adapter was trained on"),
    "tokenizer-differs": (WARNING, "tokenizer.json differs from the one the adapter was trained with"),
    "template-differs": (WARNING, "the chat template differs from the one the adapter was trained with"),
}  # fmt: skip

# Does it meet the requirements of this check?
_REQUIREMENTS: _Codes = {
    "rank-above-max": (ERROR, "the rank of a module is above the largest rank allowed"),
    "runtime": (ERROR, "a required runtime would not apply the adapter as it was trained"),
}  # fmt: skip

# Could a file run code, or mislead who reads it? (`scan`, which also reports codes of the first group.)
_SCAN: _Codes = {
    "archive": (ERROR, "an archive, or compressed bytes, whatever the name"),
    "program": (ERROR, "a program, a script or a library"),
    "disguised": (ERROR, "the contents of a file are not what its name promises"),
    "unknown-binary": (ERROR, "a file that is not text, of a type that no adapter needs"),
    "polyglot": (ERROR, "a file that also contains something of another type: an archive, a program or a page"),
    "trailing-data": (ERROR, "bytes after the end of a file's contents"),
    "hidden-data": (ERROR, "bytes within a file that belong to nothing in it"),
    "remote-code": (ERROR, "a config has a program import code, load a kernel or build objects by name"),
    "outside-path": (ERROR, "a config names a file outside of the folder"),
    "template-escape": (ERROR, "a chat template reaches for attributes, builtins or files"),
    "template-switch": (WARNING, "a chat template writes something else for certain words or dates"),
    "template-link": (WARNING, "a chat template writes an address"),
    "template-text": (NOTE, "the longest text that a chat template may add to a conversation"),
    "active-markup": (ERROR, "script or embedded content in a card, a picture or a header"),
    "invisible-text": (WARNING, "invisible characters in a text"),
    "not-scanned": (WARNING, "a file, or a part of one, that scan did not look into"),
}  # fmt: skip

CODES = _FILES | _BASE | _IDENTITY | _REQUIREMENTS | _SCAN
"""Severity and meaning of each code. Codes are stable: scripts and CI match on them. `explain CODE` shows them."""
SCAN = frozenset(_SCAN)
"""The codes that only a scan reports."""
FIT = frozenset(_BASE | _IDENTITY)
"""The codes about an adapter on a base."""
UNREAD = frozenset({"no-adapter", "malformed", "missing-file", "pickle", "whole-model", "needs-base"})
"""The codes with which nothing was checked, so that they cannot be ignored."""
_LEVELS = {
    **dict.fromkeys(_BASE, "base"), **dict.fromkeys(_IDENTITY, "identity"), **dict.fromkeys(_SCAN, "scan"),
    "non-finite": "values", "files-changed": "values", "files-edited": "values", "not-packaged": "package",
    "no-base-name": "package", "left-out": "package", "rank-above-max": "max-rank", "runtime": "runtimes",
}  # fmt: skip


def level_of(code: str) -> str:
    """Return the level at which problems of a code are found (`Report.levels`)."""
    return _LEVELS.get(code, "files")


class Problem(NamedTuple):  # of which a hostile adapter may have a million
    """A finding of a check.

    Attributes:
        file: The path inside the adapter; may be empty, like `name`.
        name: The tensor, key or runtime.
        what: The message, for people; `expected` and `got` have its values for programs where two differ.
        hint: How to fix it.
        repairable: Whether `adapterhub.checks.repair` fixes it in a copy.
        cause: The error that this reports, if it comes from one.
    """

    code: str
    file: str
    name: str
    what: str
    hint: str = ""
    expected: str = ""
    got: str = ""
    repairable: bool = False
    cause: AdapterhubError | None = None

    @property
    def severity(self) -> Severity:
        """By the code."""
        return CODES[self.code][0]

    @property
    def where(self) -> str:
        """File and name, separated by a colon."""
        return ": ".join(part for part in (self.file, self.name) if part)


class RepeatedProblem(NamedTuple):
    """Problems of one code, one for each of `places`: counted at once, but created only as far as they are retained."""

    code: str
    places: Sequence[Any]
    make: Callable[[Any], Problem]


class Findings:
    """Problems in the order they are found: `limit` of each code are retained, or all if it is None, and all are counted."""

    def __init__(self, limit: int | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._by_code: dict[str, list[Problem]] = {}
        self._limit = limit

    def add(self, problems: Iterable[Problem | RepeatedProblem]) -> None:
        """Add problems."""
        for problem in problems:
            code, count = problem.code, len(problem.places) if isinstance(problem, RepeatedProblem) else 1
            # Problems beyond the limit are counted and never created.
            room = count if self._limit is None else min(self._limit - self.counts[code], count)
            if count:
                self.counts[code] += count
            if room > 0:
                added = map(problem.make, problem.places[:room]) if isinstance(problem, RepeatedProblem) else (problem,)
                self._by_code.setdefault(code, []).extend(added)

    def error_count(self) -> int:
        """Return the number of errors."""
        return sum(count for code, count in self.counts.items() if CODES[code][0] == ERROR)

    @property
    def by_code(self) -> Mapping[str, Sequence[Problem]]:
        """The retained problems, by code."""
        return self._by_code


@dataclass(frozen=True, slots=True)
class Group:
    """All problems of one code.

    Attributes:
        reason: The message of the only problem, or the meaning of the code.
        places: The locations of the first ten.
    """

    code: str
    reason: str
    count: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a runtime does with the adapter, and why.

    Attributes:
        convert_to: The format that it must be converted to first.
        causes: The codes of the problems that have this verdict as their consequence.
    """

    runtime: str
    version: str
    verdict: str
    reasons: tuple[str, ...] = ()
    convert_to: str | None = None
    causes: tuple[str, ...] = ()


def count_text(counts: Mapping[str, int], severity: Severity) -> str:
    """Return the number of problems by code as a text such as `2 errors in 24 places`; empty if there is none.

    One wrong rank in the config is one error, in however many modules.
    """
    places = sum(counts.values())
    text = f"{len(counts):,} {severity}{'s' if len(counts) > 1 else ''}" if counts else ""
    return f"{text} in {places:,} places" if places > len(counts) else text


@dataclass(frozen=True, repr=False)
class Report:
    """All problems found, and the verdicts.

    Attributes:
        problems: The worst first.
        counts: The number of problems of each code, which a limit may leave out of `problems`; empty if it has them all.
        levels: What was checked (`files`, `values`, `base`, `identity`, `package`, `max-rank`, `runtimes`, `scan`).
        ignored: The number of problems of each code that were ignored, and are not in `problems`.
        strict: Warnings count as errors do.
        base_facts: Name, revision and size of the base, and the bytes fetched to read it; empty without a base.
    """

    where: str
    format: str | None
    base: str | None
    problems: tuple[Problem, ...]
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    levels: tuple[str, ...] = ()
    strict: bool = False
    base_facts: Mapping[str, object] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no problem fails the adapter."""
        return not any(self.fails(problem) for problem in self.problems)

    def fails(self, problem: Problem) -> bool:
        """Return whether this problem alone fails the adapter."""
        return problem.severity == ERROR or (self.strict and problem.severity == WARNING)

    def count(self, severity: Severity) -> int:
        """Return the number of problems of a severity."""
        return sum(count for code, count in self.counted().items() if CODES[code][0] == severity)

    def count_text(self, severity: Severity, *, without: Collection[str] = ()) -> str:
        """Return the `count_text` of the problems of a severity, but for those of the codes in `without`."""
        counts = {code: n for code, n in self.counted().items() if CODES[code][0] == severity and code not in without}
        return count_text(counts, severity)

    def counted(self) -> Mapping[str, int]:
        """Return the number of problems of each code that has any, whether or not `problems` has all of them."""
        return self.counts or self._listed_counts

    def left_out(self, code: str) -> int:
        """Return the number of problems of a code that a limit left out of `problems`."""
        return self.counted().get(code, 0) - self._listed_counts[code]

    @cached_property
    def _listed_counts(self) -> Counter[str]:
        return Counter(problem.code for problem in self.problems)

    def grouped(self) -> list[Group]:
        """Return problems of one code as one group, the worst first: ten lines where `problems` may have 300,000."""
        by_code: dict[str, list[Problem]] = {}
        for problem in self.problems:
            by_code.setdefault(problem.code, []).append(problem)
        counts = self.counted()
        return [
            Group(
                code,
                problems[0].what if counts[code] == 1 else CODES[code][1],
                counts[code],
                tuple(problem.where for problem in problems[:10]),
            )
            for code, problems in by_code.items()
        ]

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name in SEVERITIES if (count := self.count(name)))
        return f"<Report {self.where}: {'ok' if self.ok else 'not ok'}{', ' * bool(counts)}{counts}>"

    def _repr_html_(self) -> str:
        rows = [(group.code, group.count, group.reason, ", ".join(group.places)) for group in self.grouped()]
        verdicts = [(name, verdict.verdict, "; ".join(verdict.reasons)) for name, verdict in self.verdicts.items()]
        problems = display.table(rows, head=("code", "count", "reason", "where"), caption=repr(self))
        return problems + display.table(verdicts, head=("runtime", "verdict", "reasons"))
