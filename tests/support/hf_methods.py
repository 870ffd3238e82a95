"""What each method of huggingface_hub's `HfApi` does at a hub, called one by one as the client lists them.

python -m tests.support.hf_methods      prints docs/hub-methods.md
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from types import SimpleNamespace
from typing import Any

from adapterhub.hub import gates, stars
from adapterhub.hub.gates import Gate
from adapterhub.hub.storage.from_settings import open_database
from tests.hub.conftest import Running, serving
from tests.support.adapters import write_adapter

WORKS, REFUSED, BAD = "works", "refused in words", "wrong or empty"
ELSEWHERE = "of the client alone, or of another host"
# What a parameter without a default is given, by its name; a repository of its own for each call.
_REPOSITORY = ("repo_id", "from_id", "item_id", "repository")
_VALUES: dict[str, Any] = {
    "filename": "README.md", "path_in_repo": "README.md", "path_or_fileobj": b"# New\n", "branch": "try", "tag": "prod",
    "revision": "main", "paths": ["README.md"], "delete_patterns": ["README.md"], "commit_message": "Test",
    "organization": "team", "username": "alice", "user": "bob", "model_id": "sql", "title": "Title", "discussion_num": 1,
    "comment": "A comment", "comment_id": "1", "new_content": "New", "new_status": "closed", "new_title": "New",
    "rejection_reason": "No", "collection_slug": "team/c-000000000000000000000000", "item_type": "model",
    "item_object_id": "1", "webhook_id": "1", "id": "2106.09685", "key": "KEY", "value": "value", "hardware": "cpu-basic",
    "sleep_time": 60, "volumes": [], "bucket_id": "team/bucket", "query": "sql", "private": True, "remote_path": "x",
    "resource_group_id": "1", "lfs_files": [SimpleNamespace(file_oid=64 * "0")], "files": [("x", "x")],
    "watched": ["team/sql"], "job_id": "1", "scheduled_job_id": "1", "image": "python", "command": ["true"],
    "schedule": "@daily", "labels": {}, "script": "true.py", "mount_path": "/x", "name": "x", "framework": "pytorch",
    "accelerator": "cpu", "instance_size": "x1", "instance_type": "x", "region": "x", "vendor": "x",
}  # fmt: skip
# More of a method's arguments; `NAME` is the repository.
_MORE: dict[str, dict[str, Any]] = {
    "move_bucket": {"from_id": "team/bucket", "to_id": "team/other"}, "move_repo": {"to_id": "NAME-moved"},
    "delete_branch": {"branch": "draft"}, "delete_tag": {"tag": "stable"}, "delete_folder": {"path_in_repo": "notes"},
    "update_repo_settings": {"private": True}, "create_repo": {"repo_id": "NAME-new"},
    "sync_bucket": {"source": "FOLDER", "dest": "hf://buckets/team/bucket"},
    "get_hf_file_metadata": {"url": "URL/NAME/resolve/main/README.md"}, "create_webhook": {"url": "https://site.example"},
    "copy_files": {"source": "hf://NAME/adapter_model.safetensors", "destination": "hf://NAME/copy.safetensors"},
    "parse_safetensors_file_metadata": {"filename": "adapter_model.safetensors"},
    "verify_repo_checksums": {"local_dir": "FOLDER"}, "accept_access_request": {"user": "bob"},
    "cancel_access_request": {"user": "bob"}, "reject_access_request": {"user": "bob"},
    "create_scheduled_uv_job": {"script": "FOLDER/true.py"}, "run_uv_job": {"script": "FOLDER/true.py"},
    "upload_attachment": {"path": "FOLDER/a.png"}, "sync_job_volume": {"source": "FOLDER"},
}  # fmt: skip
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_LOCAL = {"run_as_future", "get_full_repo_name"}  # ask no server, or whom the token belongs to
_WAITING = {
    "wait_for_job",
    "wait_for_space",
    "fetch_job_logs",
    "fetch_job_metrics",
    "fetch_space_logs",
}  # for what is not there
# The client wants a file that no adapter has, asks with no token, or has an error of its own for every refusal.
_OF_CLIENT = {
    "get_safetensors_metadata", "get_sharded_safetensors_metadata", "list_dataset_parquet_files", "list_jobs",
    "batch_bucket_files",
}  # fmt: skip
# The status of a request, for the methods about one.
_STATUS = {
    "list_pending_access_requests": gates.PENDING, "accept_access_request": gates.PENDING,
    "reject_access_request": gates.PENDING, "list_accepted_access_requests": gates.ACCEPTED,
    "cancel_access_request": gates.ACCEPTED, "list_rejected_access_requests": gates.REJECTED,
}  # fmt: skip
_INFERENCE = "inference"  # in the names of methods that ask another host


def outcomes(hub: Running, folder: Path) -> dict[str, tuple[str, str]]:
    """Return for each public method what it does, and the words of a refusal or of a failure."""
    from huggingface_hub import HfApi

    api = HfApi(hub.url, token=hub.make_token("alice", "admin"))
    hub.make_token("bob", "read")
    names = [name for name, _ in inspect.getmembers(HfApi, inspect.isfunction) if not name.startswith("_")]
    outcome_by_method = {}
    for number, name in enumerate(names):
        if name in _LOCAL:
            outcome_by_method[name] = WORKS, ""
        elif _INFERENCE in name or name in _WAITING | _OF_CLIENT:
            outcome_by_method[name] = ELSEWHERE, ""
        else:
            repository = _repository(api, f"team/a{number}", folder / str(number))
            if "access" in name or "like" in name:
                _prepare(hub, repository, _STATUS.get(name, ""))
            if "discussion" in name or "pull_request" in name:
                api.upload_file(path_or_fileobj=b"# New\n", path_in_repo="README.md", repo_id=repository, create_pr=True)
            outcome_by_method[name] = _outcome(api, name, repository, folder / str(number))
    return outcome_by_method


def _repository(api: Any, name: str, folder: Path) -> str:
    """A repository with an adapter, a folder, a branch and a tag."""
    write_adapter(folder, 1)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A test\n")
    (folder / "notes").mkdir()
    (folder / "true.py").write_text("")
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "notes" / "n.json").write_text("[]")
    api.create_repo(name)
    api.upload_folder(folder_path=folder, repo_id=name, ignore_patterns=["*.py", "*.png"])
    api.create_branch(name, branch="draft")
    api.create_tag(name, tag="stable")
    return name


def _prepare(hub: Running, repository: str, status: str) -> None:
    """Give a repository a star, gate it, and have the account bob ask for access; without a status it has not asked."""
    with closing(open_database(hub.settings)) as database:
        stars.give(database, repository, "alice")
        gates.set_gate(database, repository, Gate(gates.MANUAL))
        if status:
            gates.ask(database, repository, "bob")
        if status not in ("", gates.PENDING):
            gates.decide(database, repository, "bob", status, decider="alice")


def _outcome(api: Any, name: str, repository: str, folder: Path) -> tuple[str, str]:
    from huggingface_hub import CommitOperationAdd

    method: Callable[..., Any] = getattr(api, name)
    values = {**_VALUES, **dict.fromkeys(_REPOSITORY, repository), "folder_path": folder, "fn": len}
    values |= {"path": folder / "README.md", "operations": [CommitOperationAdd("n.json", b"[1]")]}
    values |= {"additions": [CommitOperationAdd("n.json", b"[1]")]}
    parameters = inspect.signature(method).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is parameter.empty and parameter.kind in _NAMED]
    texts = {"NAME": repository, "URL": api.endpoint, "FOLDER": str(folder)}
    extra_arguments = {key: _filled(value, texts) for key, value in _MORE.get(name, {}).items()}
    chosen = {
        **{parameter.name: values[parameter.name] for parameter in required if parameter.name in values},
        **extra_arguments,
    }
    positional = [chosen.pop(parameter.name) for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]
    try:
        result = method(*positional, **chosen)
        if isinstance(result, Iterator):
            result = [*result]
    except Exception as error:  # whatever the client raises is what its user sees
        return _refusal(error)
    is_empty = result is not None and not result and not isinstance(result, bool)
    return (BAD, f"{result!r}") if is_empty or result is False else (WORKS, "")


def _filled(value: Any, texts: dict[str, str]) -> Any:
    for key, text in texts.items():
        value = value.replace(key, text) if isinstance(value, str) else value
    return value


def _refusal(error: Exception) -> tuple[str, str]:
    response = getattr(error, "response", None)
    words = response.headers.get("x-error-message", "") if response is not None else ""
    if response is not None and words and 400 <= response.status_code < 502:
        return REFUSED, words
    return BAD, f"{type(error).__name__}: {str(error)[:200]}"


def page(outcome_by_method: dict[str, tuple[str, str]]) -> str:
    """Return docs/hub-methods.md."""
    from huggingface_hub import __version__

    kinds = (WORKS, REFUSED, ELSEWHERE, BAD)
    lines = [
        "# What huggingface_hub's methods do at a hub",
        "",
        f"Each public method of `HfApi` of huggingface_hub {__version__}, called at a hub with an adapter. This page is",
        "printed by `python -m tests.support.hf_methods`, and a test compares it with what the methods do.",
        "",
    ]
    ordered = sorted(outcome_by_method, key=lambda name: (kinds.index(outcome_by_method[name][0]), name))
    for kind, names in groupby(ordered, key=lambda name: outcome_by_method[name][0]):
        listed = [*names]
        lines += [f"## {kind.capitalize()}: {len(listed)}", "", *wrap(", ".join(f"`{name}`" for name in listed), 125), ""]
    return "\n".join(lines)


def main() -> None:
    """Print the page, and to stderr the reasons of failures and refusals."""
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary) / "hub") as hub:
        os.environ["HF_HOME"] = temporary
        outcome_by_method = outcomes(hub, Path(temporary))
    sys.stdout.write(page(outcome_by_method))
    for name, (kind, words) in outcome_by_method.items():
        if kind in (BAD, REFUSED):
            print(f"{kind}: {name}: {words}", file=sys.stderr)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
