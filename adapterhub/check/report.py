"""What a check says: problems with stable codes, and a verdict per runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapterhub_converters import display

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)

# Code -> severity and meaning. Codes are stable: scripts and CI match on them. docs/validate.md has this table.
CODES: dict[str, tuple[str, str]] = {
    # Can the files be believed?
    "malformed": (ERROR, "a file is truncated, malformed or hostile; nothing of it was believed"),
    "missing-file": (ERROR, "a file that the format needs is not there"),
    "pickle": (ERROR, "the weights are a pickle, which can run code when it is loaded"),
    "stray-pickle": (WARNING, "a pickle lies beside the safetensors file; other programs may load it instead"),
    "not-understood": (ERROR, "a config key changes what the adapter computes in a way that is not known here"),
    "needs-base": (ERROR, "the format says too little to be read without the base: give --base"),
    "files-changed": (ERROR, "bytes are not the ones that adapter.json names"),
    # Do config and tensors agree with each other?
    "key-prefix": (ERROR, "tensors are not named `base_model.model.…`; peft would skip them without a word"),
    "unknown-tensor": (ERROR, "a tensor is of no kind that is known here"),
    "missing-half": (ERROR, "lora_A without its lora_B, or the other way round"),
    "not-a-matrix": (ERROR, "a factor does not have two dimensions"),
    "empty-tensor": (ERROR, "a tensor has no elements, as ZeRO-3 saves when weights were not gathered"),
    "rank-differs": (ERROR, "lora_A and lora_B of a module have different ranks"),
    "rank-config": (ERROR, "the rank in the config is not the one of the tensors; peft would refuse to load them"),
    "not-targeted": (ERROR, "a module has tensors, but target_modules does not name it: peft skips them without a word"),
    "part-shape": (ERROR, "a magnitude or bias does not have one element an output feature"),
    "no-magnitude": (ERROR, "use_dora is true, but a module has no magnitude vector"),
    "magnitude-flag": (ERROR, "magnitude vectors are there, but use_dora is not true; peft would skip them"),
    "bias-flag": (ERROR, "lora_B.bias is there, but lora_bias is not true; peft would skip it"),
    "no-bias": (WARNING, "lora_bias is true, but a module has no lora_B.bias"),
    "token-rows": (ERROR, "trainable_token_indices does not name as many rows as there are"),
    "overwrites-base": (WARNING, "a whole tensor is loaded over the base's own though modules_to_save does not name it"),
    "not-floats": (ERROR, "a tensor's dtype is not one that adapters are computed in"),
    "non-finite": (ERROR, "a tensor has a NaN or an infinity"),
    "does-nothing": (WARNING, "every lora_B is zero, or alpha is: the adapter changes nothing"),
    "pattern-overlap": (WARNING, "two patterns match one module and say different things; peft loses their order"),
    "pattern-unused": (WARNING, "a pattern matches no module: probably a typo"),
    "initial-adapter": (WARNING, "the init changed the base: right only together with the initial adapter"),
    # Does it fit the base?
    "base-without-weights": (NOTE, "the base has no weight files here: shapes are those its config says, or are not compared"),
    "base-incomplete": (NOTE, "a part of the base could not be read, so that was not compared"),
    "shape-unknown": (NOTE, "the base stores a module in a quantization whose logical shape is not known here"),
    "other-prefix": (ERROR, "modules have another prefix than the base's"),
    "headless-base": (NOTE, "the base was saved without its head: prefixes differ in a way that transformers repairs"),
    "headless-adapter": (NOTE, "the adapter was trained on the model without its head: load the base with AutoModel"),
    "renamed-modules": (NOTE, "the base's files have older names; transformers renames modules as it loads them"),
    "new-head": (NOTE, "the base has no such head; the class of the task makes it, the adapter brings its weights"),
    "no-such-module": (ERROR, "the adapter changes a module that the base does not have"),
    "base-shallower": (ERROR, "the adapter changes layers that the base does not have"),
    "base-deeper": (ERROR, "the base has layers that the adapter should cover and does not"),
    "uncovered-module": (ERROR, "target_modules names a module of the base for which there are no tensors"),
    "shape-mismatch": (ERROR, "the factors do not multiply to the shape of the base's weight"),
    "vocab-differs": (ERROR, "an embedding or output layer has another number of tokens than the base"),
    "row-outside": (ERROR, "a replaced token row is outside the base's vocabulary"),
    "tied-weights": (WARNING, "only one of two tied tables is changed; runtimes disagree on what that means"),
    "does-not-fit": (ERROR, "the adapter cannot be read as one for this base"),
    # Is it the very base?
    "unpinned": (NOTE, "no adapter.json says which base the adapter was trained on"),
    "base-differs": (ERROR, "names and shapes of the base are not those of the base in adapter.json"),
    "numerics-differ": (ERROR, "a number that changes the function (rope, norm, heads) is not the one in adapter.json"),
    "base-name-differs": (WARNING, "the base has another name than the one the adapter was trained on"),
    "tokenizer-differs": (WARNING, "tokenizer.json is not the one the adapter was trained with"),
    "template-differs": (WARNING, "the chat template is not the one the adapter was trained with"),
    # Will the runtime that was asked for do it?
    "rank-above-max": (ERROR, "a module's rank is above the largest that the runtime will be set to take (--max-rank)"),
    "runtime": (ERROR, "a runtime named with --for would not apply the adapter as it was trained"),
}  # fmt: skip

_ORDER = list(CODES)
FIT = frozenset(_ORDER[_ORDER.index("base-without-weights") : _ORDER.index("rank-above-max")])
"""The codes that are about an adapter on a base."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    `file` inside the adapter and `name` of the tensor, key or runtime in it may be empty, as may `expected` and `got`, which
    say for programs what `what` says for people.
    """

    code: str
    file: str
    name: str
    what: str
    hint: str = ""
    expected: str = ""
    got: str = ""

    @property
    def severity(self) -> str:
        """`error`, `warning` or `note`; a property of the code."""
        return CODES[self.code][0]

    @property
    def where(self) -> str:
        """File and name as one line would say them."""
        return ": ".join(part for part in (self.file, self.name) if part)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a runtime makes of the adapter, and why; `convert_to` names the format it must be converted to first."""

    runtime: str
    version: str
    verdict: str
    reasons: tuple[str, ...] = ()
    convert_to: str | None = None


@dataclass(frozen=True, repr=False)
class Report:
    """All that a check found.

    `levels`: what was looked at (`files`, `values`, `base`, `identity`). `strict`: warnings count as errors do.
    `base_facts`: what the base is and what reading it took; empty without one.
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

    @property
    def ok(self) -> bool:
        """Whether nothing fails it."""
        return not any(self.fails(problem) for problem in self.problems)

    def fails(self, problem: Problem) -> bool:
        """Whether this problem alone makes the adapter not ok."""
        return problem.severity == ERROR or (self.strict and problem.severity == WARNING)

    def count(self, severity: str) -> int:
        """How many problems have this severity."""
        return sum(problem.severity == severity for problem in self.problems)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}{'s' * (count > 1)}" for name in SEVERITIES if (count := self.count(name)))
        return f"<Report {self.where}: {'ok' if self.ok else 'not ok'}{', ' * bool(counts)}{counts}>"

    def _repr_html_(self) -> str:
        rows = [(one.severity, one.code, one.where, one.what, one.hint) for one in self.problems]
        verdicts = [(name, one.verdict, "; ".join(one.reasons)) for name, one in self.verdicts.items()]
        problems = display.table(rows, head=("severity", "code", "where", "what", "hint"), caption=repr(self))
        return problems + display.table(verdicts, head=("runtime", "verdict", "reasons"))
