"""The project's file: one grammar, errors with the line, and changes that change nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterhub import user_files
from adapterhub.cli.commands.init import _TEMPLATE
from adapterhub.project import settings_file
from adapterhub.project.policy import Policy
from adapterhub_converters.errors import LocalIOError, UsageError

WHOLE = """\
# ours
registry = "store"  # beside this file
remote = "team"

[remotes.team]
url = "oci://registry.example/adapters"

# read by everybody
[remotes.free]
url = "oci://free.example"

[policy]
max_rank = 16
require_base = true
licenses = ["Apache-2.0", "MIT"]
allow = ["team/*", "oci://registry.example/*"]
"""


def test_all_that_may_stand_there_is_read(tmp_path: Path) -> None:
    settings = settings_file.parse(WHOLE, tmp_path / "adapterhub.toml")
    assert (settings.registry, settings.remote) == (tmp_path / "store", "team")
    assert dict(settings.remotes) == {"team": "oci://registry.example/adapters", "free": "oci://free.example"}
    settings_path = str(tmp_path / "adapterhub.toml")
    assert settings.policy == Policy(settings_path, 16, True, ("Apache-2.0", "MIT"), ("team/*", "oci://registry.example/*"))


def test_the_template_sets_nothing_and_all_of_its_examples_are_valid(tmp_path: Path) -> None:
    assert settings_file.parse(_TEMPLATE, tmp_path / "x").remotes == {}
    lines = [line.removeprefix("# ") for line in _TEMPLATE.splitlines()[3:]]
    assert settings_file.parse("\n".join(lines), tmp_path / "x").policy.max_rank == 64


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("registri = 'x'", 1, "'registri' is unknown"),
        ("\n\n[polizy]\nx = 1", 3, "'polizy' is unknown"),
        ("[policy]\nmax_rank = 8\nmaxrank = 8", 3, "'policy.maxrank' is unknown"),
        ("[remotes.team]\nurl = 'oci://x'\nuser = 'me'", 3, "'remotes.team.user' is unknown"),
        ("[remotes.team]\n", 1, "'remotes.team.url' is missing"),
        ("[remotes.'a b']\nurl = 'oci://x'", None, "'remotes.a b' is not a valid remote"),
        ("[policy]\nmax_rank = true", 2, "not a whole number above 0"),
        ("[policy]\nmax_rank = 0", 2, "not a whole number above 0"),
        ("[policy]\nallow = []", 2, "not a list of strings"),
        ("[policy]\nlicenses = 'MIT'", 2, "not a list of strings"),
        ("[policy]\nrequire_base = 1", 2, "neither true nor false"),
        ("[validate]\nstrict = 1", 2, "neither true nor false"),
        ("[validate]\nbase = 'b'\nignored = ['x']", 3, "'validate.ignored' is unknown"),
        ("[validate]\nruntimes = 'vllm'", 2, "not a list of strings"),
        ("remotes = 3", 1, "'remotes' is not a table"),
        ("registry = 3", 1, "not a string of one line"),
        ("[policy.signers]\n'*' = [\"a\\u0000b\"]", 2, "paths of keys"),
        ("remote = ", None, "not valid TOML"),
        ("a = " + "[" * 5000, None, "not valid TOML"),
    ],
)
def test_what_isn_t_known_or_right_is_refused_with_its_line(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_file.parse(text, tmp_path / "x.toml")
    assert words in str(caught.value)
    assert line is None or caught.value.where.endswith(f"x.toml:{line}") or "is missing" in words


def test_a_home_of_nobody_stays_as_it_is_written(tmp_path: Path) -> None:
    settings = settings_file.parse(
        "registry = '~nobody-here/r'\n[policy.signers]\n'*' = ['~nobody-here/k.pub']", tmp_path / "x.toml"
    )
    assert settings.registry == tmp_path / "~nobody-here/r"
    assert settings.policy.signers == (("*", (tmp_path / "~nobody-here/k.pub",)),)


def test_a_file_is_replaced_whole_and_keeps_its_mode_and_its_link(tmp_path: Path) -> None:
    path, link = tmp_path / "x", tmp_path / "link"
    assert user_files.change(path, lambda text: text + "1")
    path.chmod(0o604)
    link.symlink_to(path)
    assert user_files.change(link, lambda text: text + "2")
    assert link.is_symlink()
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("12", 0o604)
    assert not user_files.change(path, lambda _: None)
    assert sorted(os.listdir(tmp_path)) == ["link", "x"]


def test_a_private_file_is_its_owner_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    user_files.change(path, lambda _: "secret", private=True)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    for act in (lambda: user_files.read(path, private=True), lambda: user_files.change(path, lambda _: "", private=True)):
        with pytest.raises(LocalIOError, match=r"others can read it, so it is not used. Run `chmod 600 \S+`, or remove it"):
            act()
    path.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        with pytest.raises(LocalIOError, match="another user"):
            user_files.read(path, private=True)
        assert not user_files.is_mine(path)
