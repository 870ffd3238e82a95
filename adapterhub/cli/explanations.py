"""The meaning of every code, why it is reported, and what to do: for `adapterhub explain` and the reference.

`checks.CODES` has the meaning of each finding of `adapterhub validate` and `scan`, `errors.HINTS` the fix of each error; the texts
that they have no room for are here.
"""

from __future__ import annotations

from typing import NamedTuple

from adapterhub.checks import CODES, SCAN

from .errors import HINTS


class Explanation(NamedTuple):
    """A code: `kind` is the severity of a finding, or `error` of any other command.

    Attributes:
        meaning: One line; empty if `text` is all.
        text: Why, and what to do.
        fix: The hint that the error itself has, with the names of its fields in capitals; empty for a finding.
    """

    code: str
    kind: str
    meaning: str
    text: str
    fix: str

    @property
    def reported_by(self) -> str:
        """The command that reports it as a finding, `validate` or `scan`; empty for an error of any command."""
        return "scan" if self.code in SCAN else "validate" if self.code in CODES else ""


class _Capitals(dict[str, str]):
    """Stands in for the fields of an error: each is its own name in capitals."""

    def __missing__(self, key: str) -> str:
        return key.upper()


def codes() -> tuple[str, ...]:
    """Return all codes: findings in the order of the checks, then errors by name."""
    return (*CODES, *sorted(set(ERRORS) - set(CODES)))


def explanation(code: str) -> Explanation | None:
    """Return the explanation of a code; None for an unknown one."""
    fix = HINTS.get(code, "").format_map(_Capitals())
    if code in CODES:
        severity, meaning = CODES[code]
        return Explanation(code, severity, meaning, FINDINGS.get(code, ""), fix)
    return Explanation(code, "error", "", ERRORS[code], fix) if code in ERRORS else None


FINDINGS: dict[str, str] = {
    # Are the files well-formed?
    "no-adapter": "Nothing is at the path, the ref or the address, or it is of no known format. Check the spelling; `adapterhub list` shows the refs of the registry, `adapterhub formats` the formats.",
    "malformed": "A header is cut short, has impossible lengths, or names a key twice. Most often a download or an upload was interrupted, or Git LFS left a pointer in place of the file (`git lfs pull`). Fetch the file again.",
    "missing-file": "Weights without their config, or the other way around. Without adapter_config.json nothing has the adapter's alpha: restore the file, or make one with `adapterhub fix SRC --alpha N`.",
    "pickle": "A .bin or .pt file is a program that its reader runs. Save the adapter again as safetensors; `adapterhub convert --unsafe-pickle` reads one that you trust, in a process of its own.",
    "stray-pickle": "peft takes the safetensors file, but other programs may take the pickle, which can run code and can have other weights. Delete it.",
    "whole-model": "The file has the weights of a model, not low-rank factors. Name the adapter instead, or make one from a fine-tuned model with `adapterhub extract`.",
    "not-understood": "The kind of adapter in `peft_type` is not one that this version knows. It can be stored, pulled and copied as it is, but not converted or merged, and nothing about its function was checked. Upgrade adapterhub.",
    "unsupported": "The kind is known, but something in it is not read, so that a conversion or a merge could compute something else. The message names the part.",
    "unknown-key": "peft ignores a key that it does not know, with a warning, so the adapter loads. A misspelled key does nothing. Keys of a newer peft without a value are dropped by `adapterhub fix`.",
    "needs-base": "The format stores only names or numbers that mean something together with the base. Pass --base.",
    "order-unknown": "Rows of some projections are stored in an order that depends on the number of heads of the base. Pass --base to have them compared.",
    "files-changed": "adapter.json has the digest of each file, and the weights or the config are not those. If you changed them on purpose, run `adapterhub describe DIR`, which renews it; if not, the file was damaged: pull it again.",
    "files-edited": "A card or another file was edited since adapter.json was written. Nothing is wrong; the next push records it, or `adapterhub describe DIR` does.",
    "not-packaged": "A version contains no pickled weights, links or devices, since a program that loads it would run or follow them. Remove the file, or convert it.",
    "left-out": "Checkpoints, optimizer states, scripts and dotfiles are not part of a version. Use `push --include` for a file that should be.",
    # Do config and tensors agree with each other?
    "key-prefix": "peft matches tensors by their full names, and silently skips those that do not begin with `base_model.model.`: the adapter loads and does nothing. `adapterhub fix` renames them where the right name is certain.",
    "unknown-tensor": "A name ends in nothing that an adapter of this kind has. It may belong to another kind, or be left over from a checkpoint.",
    "missing-half": "A delta is the product lora_B · lora_A, so one without the other changes nothing. The file was cut, or was written by a program that filters tensors by name.",
    "not-a-matrix": "A factor of a linear layer has two dimensions. One with none or one was flattened or gathered wrongly, as by an interrupted FSDP save.",
    "empty-tensor": "DeepSpeed ZeRO-3 holds parameters in pieces, and leaves tensors of no elements in a file that was saved without gathering them. Save it again with `stage3_gather_16bit_weights_on_model_save`.",
    "rank-differs": "lora_A is (r, in) and lora_B is (out, r); the two r are not the same number, so that they cannot be multiplied.",
    "rank-config": "`r`, or `rank_pattern` for that module, is not the rank of the tensors. peft makes layers of the config's rank, and then refuses the tensors. `adapterhub fix` writes the ranks of the tensors into the config.",
    "not-targeted": "peft makes layers for the modules of `target_modules`, and silently skips tensors for others. `adapterhub fix` lists the modules that have tensors.",
    "part-shape": "A DoRA magnitude or a bias has one number for each output feature of its module.",
    "no-magnitude": "With `use_dora` every module has a magnitude vector. A module without one cannot be computed as it was trained.",
    "magnitude-flag": "Magnitudes are in the file, but without `use_dora: true` peft skips them: the adapter would act as plain LoRA, which it was not trained as. `adapterhub fix` sets the key if every module has one.",
    "bias-flag": "peft skips `lora_B.bias` without `lora_bias: true`. `adapterhub fix` sets the key.",
    "no-bias": "`lora_bias` is true, and peft fills the missing bias with zeros.",
    "token-rows": "`trainable_token_indices` lists token ids, and the file has one row for each. With different numbers, rows go to the wrong tokens.",
    "overwrites-base": "The file has a whole weight of the base, not a delta. peft loads it only if `modules_to_save` names the module; other programs may load it regardless, or never.",
    "not-floats": "Factors are float32, float16 or bfloat16. Save the adapter in one of these.",
    "non-finite": "One NaN or infinity makes every answer of the model NaN. The training diverged, or float16 overflowed; use an earlier checkpoint.",
    "does-nothing": "lora_B begins at zero, and is still zero everywhere: the adapter was saved before the first step, or its parameters were not trained.",
    "pattern-overlap": "Two keys of `rank_pattern` or `alpha_pattern` match one module with different values. peft takes the first, but its own way of saving sorts them, so that the order may be lost. Write whole paths.",
    "pattern-unused": "A key of `rank_pattern` or `alpha_pattern` names no module, so that the module it was meant for has the default.",
    "initial-adapter": "PiSSA, OLoRA and LoftQ subtract the initial adapter from the base before training. On the original base, only the difference from the initial adapter is right: save it with peft's `path_initial_model_for_weight_conversion`.",
    "scale-large": "Scaling is alpha / r. Values above 64 are mostly a misplaced alpha. If it is meant, ignore the note.",
    "local-base-name": "Other people cannot find the base by a path of your disk. `adapterhub push --base` or `describe --base` records the model itself.",
    "image-model": "The names and shapes of its tensors show both. Nothing is wrong; a program for another family does not load it.",
    # Does it fit the base?
    "base-without-weights": "The folder of the base has a config, but no safetensors files. Shapes follow from the config where the architecture is known.",
    "base-incomplete": "A shard is missing, or has no readable header. The rest was compared.",
    "shape-unknown": "The base stores the module in packed integers whose layout is not known, so that its shape could not be compared.",
    "other-prefix": "The adapter says `model.layers…` where the base says `language_model.model.layers…`, or similar: it was trained on another class of the same model. Load the base with that class, or `adapterhub fix --base` renames the tensors where that is certain.",
    "headless-base": "The base was saved from AutoModel, without `model.` in its names. transformers adds it at load.",
    "headless-adapter": "The adapter was trained on AutoModel, whose modules have no `model.` in front. Load the base in the same way.",
    "renamed-modules": "The files of the base have names of an earlier transformers, which renames them at load, as is done here.",
    "new-head": "A classifier or a value head is not in a base model; `task_type` adds it, and the adapter has its weights.",
    "no-such-module": "The adapter changes a module that this base does not have: it was trained on another one.",
    "base-shallower": "The adapter has layers above the last one of the base: it was trained on a larger model of the family.",
    "base-deeper": "The config says that all layers are trained, and the base has more than the adapter: it was trained on a smaller model of the family.",
    "old-experts": "An earlier peft saved the factors of stacked experts in another order, which a current one does not compute with. `adapterhub fix` writes them as a current peft has them.",
    "uncovered-module": "`target_modules` matches a module of the base that the file has no tensors for; it stays as it is. Rename, or train it.",
    "shape-mismatch": "lora_B · lora_A has another shape than the weight that it is added to. The base has the same names, but other widths.",
    "vocab-differs": "An embedding or output layer was resized in training, as when tokens were added. Resize the base with the tokenizer that came with the adapter.",
    "row-outside": "A trained token has an id that the base's vocabulary does not reach. The tokenizer has tokens that the base was not resized for.",
    "tied-weights": "Input embedding and output layer share one table, and only one side of it is changed. Programs disagree on what that means, and llama.cpp cannot load it. Train neither, or both with `ensure_weight_tying`, or untie the base.",
    "does-not-fit": "Reading the adapter with this base failed; the message has the reason.",
    # Is it the base that was trained on?
    "unpinned": "adapter.json has no fingerprint of a base, so that a different model of the same shape would not be noticed. `adapterhub describe DIR --base BASE` records it.",
    "base-differs": "The fingerprint covers the names and shapes of all tensors. This is another model, or another version of it.",
    "numerics-differ": "Values such as rope_theta, the epsilon of a norm or the number of heads change what the model computes, but no shape. This base has others than the one in training.",
    "base-name-differs": "The base has a different name than the recorded one. Fingerprint and numerics are compared separately; a copy under another name is fine.",
    "tokenizer-differs": "Token ids may mean other texts than in training. Use the tokenizer that the adapter was trained with.",
    "template-differs": "Messages become other tokens than in training, to which a chat adapter is sensitive. Use the template that came with the adapter.",
    # Does it meet the requirements of this check?
    "rank-above-max": "vLLM and others reserve room for a largest rank (`--max-lora-rank`). Raise it there, or lower the rank with `adapterhub merge SRC --method svd --rank R`.",
    "runtime": "`--for` requires a runtime that would ignore a part of the adapter, compute something else, refuse it or crash. The verdict has the reason; a conversion often helps.",
    # Could a file run code, or mislead who reads it?
    "archive": "An adapter needs no archive, and a program that unpacks one can be led to write anywhere. Remove it, or ask its author what it is for.",
    "program": "An adapter needs no program. Do not run it.",
    "disguised": "A reader that trusts the name and one that trusts the contents see two different files. Do not use it.",
    "unknown-binary": "Nothing here can tell what the file is. Remove it if you do not know either.",
    "polyglot": "Two programs read the file as two different things, so that what was checked is not what another one runs. Do not use it.",
    "trailing-data": "Readers stop before these bytes, but a program that knows of them need not. A writer that is broken leaves them too: fetch the file from its author again.",
    "hidden-data": "No tensor has these bytes: they may be a second file. Write the weights again, by `adapterhub convert SRC OUT --to peft`.",
    "remote-code": "A program that loads the adapter may run code of the author of the config. adapterhub never does. Remove the key unless you have read that code.",
    "outside-path": "Reading the adapter would open a file of yours. Do not load it with a program that follows such names.",
    "template-escape": "The template tries to leave the sandbox that templates are rendered in. No template needs that.",
    "template-switch": "With certain words or dates the model gets other text than you see. Some templates do so to switch tools on; read the place that is named.",
    "template-link": "The model is told of an address in each conversation, and may lead people there. Read it.",
    "template-text": "It is shown so that you can read it: a template can add instructions that users never see.",
    "active-markup": "A page that shows the card or the picture could run it. The pages of a hub here show it as text.",
    "invisible-text": "Text that people do not see can tell a model, or a reader of the raw file, something else. Remove the characters.",
    "not-scanned": "The part that is named is too large or of a kind that scan does not open; nothing is known about it.",
}  # fmt: skip

ERRORS: dict[str, str] = {
    "adapter-lost": "Rounding to the quantized type would erase most of what the adapter changes, so the result would be the base under another name. The error has the share that would be kept.",
    "adapter-lost-in-nf4": "NF4 has 16 values in a block, and most of the adapter's change is smaller than the distance between two of them.",
    "add-base": "The stored description of a base is damaged, or not that of its tensors.",
    "address-with-remote": "An address has its host in it, and --remote names another place.",
    "alpha-or-rslora-required": "The format stores no scale, and a wrong one makes the adapter too weak or too strong without any error later. Nothing here knows it: you have to.",
    "alpha-recorded": "The scale is recorded in the file itself, so an option for it could only contradict.",
    "alpha-required": "The format stores no alpha. It is in the config of the training.",
    "as-trained": "`--onto as-trained` reproduces the quantized base of a QLoRA training. This adapter's record has none, or one that cannot be reproduced on this base.",
    "attested-base": "The attestation is about the adapter on a base, by digest, and is only compared with one that you name.",
    "base-name-taken": "A base of that name is registered, and it is another model.",
    "base-required": "The operation depends on the base: the order of its heads, its names or its weights.",
    "base-to-gguf": "llama.cpp reads GGUF files alone. `adapterhub convert BASE base.gguf --to gguf` makes one from a folder.",
    "broken-index": "registry.db is not a database, or not one of adapterhub. It is an index only: versions and tags are in .adapterhub, from which it is made again.",
    "check-failed": "A push compares the adapter with itself and, if it is given, its base. Codes in the message are findings of `adapterhub validate`.",
    "check-failed-for-good": "The adapter cannot be read, so that no option stores it.",
    "check-failed-on-base": "The adapter does not fit the base that it should be pinned to.",
    "check-registry": "Bytes in the registry are not those of their digest, or a blob is missing: a disk failed, or a file was changed by hand.",
    "collect-garbage": "Data that nothing refers to takes space and does no harm.",
    "config-key": "The config of a training has no such key.",
    "convert-there": "A conversion is recorded in the lineage of a registry, so the source has to be in it.",
    "convert-to-peft": "`adapterhub fix` repairs PEFT folders and state dicts alone.",
    "credentials-in-address": "An address is shown in logs and by `ps`. Passwords are entered with `adapterhub login`.",
    "delete-and-rebuild": "The file is damaged beyond repair. What it indexes is in .adapterhub.",
    "expect-unsupported": "`--expect` compares a tag and moves it in one step, which this kind of remote cannot do.",
    "gateway-needs-keys": "Beyond this machine, anyone who reaches the address could use the model. A route file has digests of keys.",
    "gguf-type-for-folder": "q8_0 and its like are types of GGUF files.",
    "hole": "The header of a safetensors file leaves bytes that belong to no tensor, in which something could be hidden. safetensors does not write such files.",
    "has-children": "Other versions were made from it, and their lineage would lead nowhere.",
    "hub-needs-login": "Beyond this machine, anyone who reaches the address could read the adapters.",
    "image-here": "A container image is for software elsewhere; versions in the local registry are files.",
    "image-repacked": "The layer of the image is not the one that was packaged: somebody has packed it again, other than with gzip.",
    "keys-required": "A required signature is verified by a key or an identity that you trust, and none is named.",
    "known-signer": "You have `--remember`ed who signs in this namespace, and this version is not signed by that key. Ask the owner, by another way, whether the key has changed; if so, remove the line from `known_signers` in your config folder.",
    "link-in-project": "A repository can contain a link that leads out of it, and what is written through it would land there.",
    "linked-store": "The store of a registry must be a folder: a link would let a repository make a command write elsewhere.",
    "local-only": "This command needs the log of a registry on this disk, which remotes do not have.",
    "login-required": "The registry asks who you are, or did not accept the login that is stored.",
    "look-at-log": "The log of a name lists every move of its tags with the time.",
    "loss-not-allowed": "The target format cannot express a part of the adapter. Nothing is approximated or dropped without your word; the error lists what each option would allow.",
    "misplaced": "A file of the log of a name is an entry of another name or place: somebody copied or moved it. `adapterhub fsck` tells more.",
    "mixed-embeddings": "One llama-server computes embeddings with all of its adapters at once, whichever a request names. Leave out --one-process.",
    "name-engine": "A server that runs already cannot be asked which program it is. Name it with --engine.",
    "name-of-base-and-adapter": "A request names the base or an adapter, so the two must not have one name.",
    "newer-index": "A newer adapterhub has written this registry.db, and this one does not know its tables.",
    "no-device-login": "The hub has no page on which you could approve a code.",
    "no-engine": "`adapterhub serve` starts llama.cpp, vLLM, SGLang, mlx-lm or torch, and found none that reads this base. `pip install 'adapterhub[train,serve]'` brings torch.",
    "no-lock-file": "There is no adapters.lock in this folder or above it.",
    "no-manifest": "A policy asks for facts that are in adapter.json, and the version has none. A copy into a registry without a policy derives it.",
    "no-registry": "No registry.db is in this folder or above it, and none is named by --registry or $ADAPTERHUB_REGISTRY.",
    "no-such-adapter": "The registry has no such name. `adapterhub info` shows which registry is in use: the nearest one above the folder is, before your own.",
    "no-such-base": "The text is no path, no registered base, and no model in the cache of the Hub.",
    "no-such-recipe": "The registry has no merge recipe of that name.",
    "no-such-tag": "The name is there, and has no such tag.",
    "no-such-version": "The name is there, and has no such version. `adapterhub log NAME` has those that were.",
    "not-locked": "`pull --locked` writes what is in adapters.lock and nothing else.",
    "other-base": "The recipe records the digest of every file of its base, and this is another model.",
    "other-base-shapes": "Names or shapes of this base do not match the adapter's tensors.",
    "nothing-to-attest": "An attestation is about something: that the adapter fits a base, what it was merged from, or how it was trained.",
    "output-exists": "Nothing that exists is overwritten unless you ask for it, and then only if it is an earlier output of adapterhub.",
    "passphrase-required": "The private key is encrypted.",
    "peft-type-missing": "Without `peft_type` in adapter_config.json, peft cannot tell what kind of adapter it is.",
    "protected": "The tag was protected, so that nobody moves it by mistake.",
    "public-needs-tls": "Tokens and answers would cross the network in the clear.",
    "quantized-base": "The weights of the base are packed integers, to which no delta can be added without changing their type.",
    "quota": "The namespace has reached the size or number of files that its hub allows. `adapterhub hub namespace set` changes it.",
    "rebuild-index": "registry.db and the logs in .adapterhub disagree. The logs are right.",
    "recipe-adapter-missing": "The recipe names the adapter by digest, and neither the registry nor --adapter has it.",
    "recipe-adapter-moved": "The folder has other bytes than the adapter of the recipe.",
    "recipe-base-elsewhere": "The recipe records a path that is not on this machine.",
    "recipe-base-required": "The adapter was made with a base, by its fingerprint, and none or another one was given.",
    "recipe-name-taken": "The registry has a recipe of that name, for another model.",
    "ref-as-remote": "The word after --remote is the name of a remote.",
    "removed": "The name was removed. Its versions exist until `adapterhub gc` removes their data.",
    "removed-name": "A removed name is not given to another adapter, so that old references do not come to mean something else.",
    "repair": "A blob has other bytes than its digest. A good copy can come from another registry or from the adapter's folder.",
    "repair-missing": "A blob is gone. A copy can come from another registry or from the adapter's folder.",
    "rows-not-whole-blocks": "The type packs numbers of a row in blocks of 32, and the adapter's rank is no multiple of it.",
    "several-models": "The adapter acts on several models of a pipeline, such as a UNet and a text encoder, and PEFT has one model in a folder.",
    "signature": "The signature is missing, is by another key or identity, or is about other files. The message tells which. Do not use the files.",
    "signature-name": "The signature is valid, for another name: somebody may offer you a different adapter than the one you asked for.",
    "source-damaged": "A file changed, or lost bytes, while it was sent. Nothing was stored at the other end.",
    "store-of-registry": "The folder belongs to a registry, whose logs and index a plain write would bypass.",
    "sum-too-large": "A sum exceeds 65,504, the largest float16.",
    "t-for-weights": "slerp has a position between two adapters and no weights.",
    "token-without-tls": "Your token would cross the network in the clear.",
    "torchtune-export": "torchtune's export of DoRA has the magnitudes of q and k in another order than their rows.",
    "trailing": "Bytes follow the last tensor of a safetensors file, in which something could be hidden. safetensors does not write such files.",
    "training-memory": "The training would need more memory than is free, and would be killed. The error names the setting that helps most.",
    "training-stopped": "A signal stopped the training. Its checkpoint is next to the output, and the same command resumes from it.",
    "two-types": "--dtype and --requantize both choose the type of the result.",
    "type-not-writable": "The tensor has a type that is read here, and not written.",
    "unknown-folder": "The project names a folder outside of itself, and a job cannot be asked. A repository's author could choose any folder of yours.",
    "unknown-host": "The project names a host that you have not used before, and a job cannot be asked. A repository's author could have you contact any host.",
    "unknown-method": "There is no such method to merge by.",
}  # fmt: skip
