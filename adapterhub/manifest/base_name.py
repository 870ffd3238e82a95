"""The name of a base on the Hugging Face Hub, as adapters, cards and folders give it."""

from __future__ import annotations

from adapterhub_converters import safe_regex

# `name` or `organization/name` (huggingface_hub, `utils/_validators.py`, `validate_repo_id`).
_REPO = safe_regex.Pattern(r"\w[\w.-]*(/\w[\w.-]*)?")
_CHECKPOINT = safe_regex.Pattern(r"(.*/)?checkpoint-\d+")  # the folders of a Trainer
_MAX_NAME = 96  # characters


def public_repo(name: str | None) -> str | None:
    """Return the name if it can be one on the Hub; None for a path.

    A path means nothing on another machine, and would make a digest depend on who trained the adapter.
    """
    if not name or len(name) > _MAX_NAME or not _REPO.fullmatch(name) or _CHECKPOINT.fullmatch(name):
        return None
    return None if "--" in name or ".." in name or name.endswith((".", "-", ".git")) else name


def base_name(
    *,
    declared: object = None,
    recorded: str | None = None,
    configured: object = None,
    in_card: str | None = None,
    of_base: str | None = None,
) -> str | None:
    """Return the name of an adapter's base: the first that can be one on the Hub, in the order of the arguments.

    Args:
        declared: `[base] repo` of adapter.toml.
        recorded: The name in adapter.json.
        configured: `base_model_name_or_path` of the config.
        in_card: `base_model` of the card.
        of_base: What the base at hand says of itself.
    """
    names = (declared, recorded, configured, in_card, of_base)
    return next((repo for name in names if isinstance(name, str) and (repo := public_repo(name))), None)
