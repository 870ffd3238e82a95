"""Judge what each runtime does with an adapter, from its features and the rules in `adapterhub_converters.runtime_rules`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from adapterhub_converters import safe_regex
from adapterhub_converters.formats import image_targets
from adapterhub_converters.runtime_rules import (
    APPLIED,
    CRASHES,
    REFUSED,
    RUNTIMES,
    UNKNOWN,
    VERDICTS,
    WRONG,
    Rule,
    Runtime,
)

from .adapter_features import features_of
from .contents import Contents
from .peft_load import LOADERS, Loader
from .peft_verdict import Loading, is_left_to_peft, load_consequences
from .report import CODES, ERROR, Problem, Verdict

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_FIELD = safe_regex.Pattern(r"\{\w+\}")

_REASONS = 5  # of a verdict
_NOT_LOADED = (REFUSED, CRASHES)
# Code of a problem to the feature of the adapter that rules of runtimes name.
_FROM_PROBLEM = {
    "shape-mismatch": "shape", "vocab-differs": "shape", "row-outside": "shape",
    "no-such-module": "no-module", "other-prefix": "no-module", "base-shallower": "no-module",
    "base-deeper": "deeper", "uncovered-module": "uncovered", "unknown-key": "unknown-key",
    "rank-config": "rank-config", "magnitude-flag": "magnitude-flag", "no-magnitude": "no-magnitude", "bias-flag": "bias-flag",
    "adapter-name": "adapter-name", "missing-tensor": "missing-tensor", "not-floats": "not-floats",
}  # fmt: skip
# Features of which `peft_load` knows what peft makes of them; `deeper` is left, since only the layers tell it.
_LOADING = frozenset({
    "shape", "uncovered", "rank-config", "magnitude-flag", "no-magnitude", "bias-flag", "no-module", "adapter-name",
    "missing-tensor", "not-targeted", "peft-refuses",
})  # fmt: skip
# Problems with names that `peft_load` follows, likewise.
_FROM_LOADING = frozenset({"key-prefix", "unknown-tensor", "missing-half"})
# Problems with which no runtime loads the adapter, unless it has a rule of its own.
_FATAL = {
    "malformed", "missing-file", "pickle", "whole-model", "unsupported", "key-prefix", "unknown-tensor", "missing-half",
    "not-a-matrix",    "needs-base", "does-not-fit", "empty-tensor", "rank-differs", "part-shape", "token-rows", "not-floats",
}  # fmt: skip
# Problems with which the numbers are wrong in every runtime.
_WRONG = {"non-finite", "classifier", "files-changed", "base-differs", "numerics-differ"}


def runtime_verdicts(
    contents: Contents | None,
    base: BaseSpec | None,
    problems: Mapping[str, Sequence[Problem]],
    loaded: Loading | None,
    *,
    values: bool = True,
) -> dict[str, Verdict]:
    """Return the verdict of every runtime.

    Args:
        problems: The problems by code.
        loaded: What peft would do with the adapter, if that is known.
        values: Whether the numbers of tensors may be read.
    """
    # Features of an adapter that cannot be read would be guesses.
    readable = contents is not None and contents.unread is None and "unsupported" not in problems
    features = dict(features_of(contents, base, values=values)) if contents and readable else {}
    features.update(
        {_FROM_PROBLEM[code]: _subject(same_code[-1]) for code, same_code in problems.items() if code in _FROM_PROBLEM}
    )
    for problem in problems.get("old-experts", ()):
        features[f"experts-{problem.got}"] = problem.what
    if "no-module" not in features:
        features.pop("vllm-unlike-any", None)
    for code in ("not-targeted", "peft-refuses"):  # obstacles for some; the others load the tensors
        if code in problems:
            features[code] = problems[code][-1].what
    reasons = {code: _first_reasons(same_code) for code, same_code in problems.items()}
    image_parts = _image_parts(contents) if contents else None
    verdicts = {
        name: _verdict(runtime, contents, features, reasons, image_parts=image_parts) for name, runtime in RUNTIMES.items()
    }
    if contents is not None and (loaded is not None or is_left_to_peft(contents)):
        for loader in LOADERS:
            verdicts[loader] = _loader_verdict(loader, contents, features, reasons, loaded)
    return verdicts


def _loader_verdict(
    loader: Loader, contents: Contents, features: Mapping[str, str], reasons: Mapping[str, list[str]], loaded: Loading | None
) -> Verdict:
    """Return the verdict of peft or transformers on an adapter in peft's format, of which it is known what they do."""
    rules = tuple(rule for rule in RUNTIMES[loader].rules if rule.feature not in _LOADING)
    followed = {code for code in reasons if code in _FROM_LOADING or _FROM_PROBLEM.get(code) in _LOADING}
    # transformers loads no magnitudes, whatever their shape.
    if loader == "transformers" and "dora" in features and not contents.config.get("lora_bias"):
        followed |= {"part-shape"} & reasons.keys()
    verdict = _verdict(
        dataclasses.replace(RUNTIMES[loader], rules=rules),
        contents,
        features,
        {code: texts for code, texts in reasons.items() if code not in followed},
        others=[_Consequence(*consequence) for consequence in load_consequences(contents, loaded, loader)],
    )
    if verdict.verdict == APPLIED:
        return verdict
    causes = sorted(code for code in followed if CODES[code][0] == ERROR)
    return dataclasses.replace(verdict, causes=(*verdict.causes, *causes))


def _subject(problem: Problem) -> str:
    """Return the part of a problem that a rule's text names."""
    return problem.name if problem.code in ("unknown-key", "adapter-name", "missing-tensor") else problem.what


def _first_reasons(problems: Iterable[Problem]) -> list[str]:
    """Return the first reasons that a verdict shows of problems of one code."""
    reasons: dict[str, None] = {}
    for problem in problems:
        reasons[f"{problem.code}: {problem.what}"] = None
        if len(reasons) == _REASONS:
            break
    return list(reasons)


class _Consequence(NamedTuple):
    """What a runtime does because of one thing, and the code of the problem that explains it, if one does."""

    verdict: str
    reason: str
    code: str = ""


def _verdict(
    runtime: Runtime,
    contents: Contents | None,
    features: Mapping[str, str],
    reasons: Mapping[str, list[str]],
    *,
    image_parts: tuple[str, ...] | None = None,
    others: Sequence[_Consequence] = (),
) -> Verdict:
    """Return the verdict of a runtime: the worst of what problems, features and conversion imply, and of `others`."""
    is_converted = contents is not None and contents.format != runtime.format
    consequences = [
        *_problem_consequences(runtime, reasons, is_readable=contents is not None and not is_converted),
        *_image_consequences(runtime, image_parts),
        *(_conversion_consequences(contents, is_converted=is_converted) if contents else ()),
        *_feature_consequences(runtime, features, reasons),
        *others,
    ]
    worst = max((consequence.verdict for consequence in consequences), key=VERDICTS.index, default=APPLIED)
    if worst in _NOT_LOADED:  # what would happen if it were loaded contradicts that it is not
        consequences = [consequence for consequence in consequences if consequence.verdict in _NOT_LOADED]
    consequences.sort(key=lambda consequence: -VERDICTS.index(consequence.verdict))
    return Verdict(
        runtime.name,
        runtime.version,
        worst,
        tuple(dict.fromkeys(reason for _, reason, _ in consequences))[:_REASONS],
        runtime.format if is_converted and worst == APPLIED else None,
        tuple(dict.fromkeys(code for verdict, _, code in consequences if verdict == worst and code)),
    )


def _problem_consequences(runtime: Runtime, reasons: Mapping[str, list[str]], *, is_readable: bool) -> Iterator[_Consequence]:
    """Yield what the problems imply; `is_readable` if the runtime reads the format as it is."""
    features = {rule.feature for rule in runtime.rules}
    for code, texts in reasons.items():
        feature = _FROM_PROBLEM.get(code)
        verdict = None
        if is_readable and code in runtime.judged:
            continue
        if code == "not-understood":  # no conversion, and so nothing for a runtime that reads another format
            verdict = UNKNOWN if is_readable else REFUSED
        elif code in _FATAL and feature not in features:
            verdict = REFUSED
        elif code in _WRONG or (feature is not None and feature not in features and CODES[code][0] == ERROR):
            verdict = WRONG
        if verdict:
            yield from (_Consequence(verdict, text, code) for text in texts)


def _image_consequences(runtime: Runtime, image_parts: tuple[str, ...] | None) -> Iterator[_Consequence]:
    """Yield what follows for an adapter of an image model; see `_image_parts`."""
    if image_parts is not None and len(image_parts) > 1:
        parts = " and ".join(image_parts)
        reason = f"it acts on {parts}, and {runtime.name} has one model; diffusers and ComfyUI read it"
        yield _Consequence(REFUSED, reason)
    elif image_parts is not None and runtime.name != "peft":
        yield _Consequence(REFUSED, "an adapter of an image model; diffusers and ComfyUI read it")


def _conversion_consequences(contents: Contents, *, is_converted: bool) -> Iterator[_Consequence]:
    """Yield what no conversion, or none without the base, can express."""
    if contents.adapter is not None and contents.adapter.added:
        reason = "it adds to norms or biases of the base, which only kohya's files can; merge it into its base"
        yield _Consequence(REFUSED, reason)
    if is_converted and contents.is_whole:
        yield _Consequence(REFUSED, "whole parameters and no delta, which a merge into its base alone can express")
    if is_converted and not contents.ordered:
        yield _Consequence(REFUSED, "its conversion needs the base model", "order-unknown")


def _feature_consequences(runtime: Runtime, features: Mapping[str, str], codes: Iterable[str]) -> Iterator[_Consequence]:
    """Yield what the rules of the runtime say about the features; `codes` are those of the problems."""
    # For each feature that a problem gave, the code of the problem, as the cause of the verdict.
    origins = {_FROM_PROBLEM[code]: code for code in codes if code in _FROM_PROBLEM}
    for feature, rule in {rule.feature: rule for rule in runtime.rules}.items():
        if feature in features:
            yield _Consequence(rule.verdict, _reason(rule, features[feature]), origins.get(feature, ""))


def _image_parts(contents: Contents) -> tuple[str, ...] | None:
    """Return the models of a pipeline that an image adapter changes, as far as it names them; None for a language model."""
    if not image_targets.are_image_targets(contents.targets):
        return None
    return contents.adapter.meta.parts if contents.adapter else ()


def _reason(rule: Rule, subject: str) -> str:
    return _FIELD.sub(lambda _: subject, rule.text)
