"""What `mkdocs build` adds to the pages of this folder: the reference of every command and code, and files outside it.

A page may link to a file of the repository, as `../examples/ci/adapters.yml`, which GitHub shows: the site has a copy of it. A
generated page is linked by the file that it is made from, which GitHub shows in its place.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]

import _run
import hub_api
import python_api
import reference

_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:examples|schemas|benchmarks|deploy)/[\w./-]+)\)")
_COMMANDS = "reference/commands"
_GENERATED = {
    "adapterhub/__init__.py": "reference/python-api.md",
    "adapterhub/hub/openapi.py": "reference/hub-api.md",
    "adapterhub/cli/explanations.py": "reference/codes.md",
    "adapterhub/training/config_help.py": "reference/training.md",
}
# Tables that only the site has, below the text that GitHub shows too.
_APPENDED: dict[str, Callable[[], str]] = {
    "commands.md": reference.commands_table,
    "benchmarks.md": lambda: _run.tables(_run.RESULTS),
}
_SOURCE = re.compile(r"\]\((?:\.\./)+(adapterhub/[\w./]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the commands into the navigation, by purpose."""
    groups = [
        {title: [f"{_COMMANDS}/{entry.name}.md" for entry in group_entries]}  # the title of a page is its first heading
        for title, group_entries in reference.entries().items()
    ]
    for section in config.nav or ():
        for pages in section.values():
            if isinstance(pages, list) and "commands.md" in pages:
                pages.insert(pages.index("commands.md") + 1, {"Each command": groups})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the files outside this folder that pages link to."""
    for group_entries in reference.entries().values():
        for entry in group_entries:
            files.append(File.generated(config, f"{_COMMANDS}/{entry.name}.md", content=reference.page(entry)))
    files.append(File.generated(config, "reference/codes.md", content=reference.codes_page()))
    files.append(File.generated(config, "reference/training.md", content=reference.training_page()))
    files.append(File.generated(config, "reference/hub-api.md", content=hub_api.page()))
    files.append(File.generated(config, "reference/python-api.md", content=python_api.page()))
    outside = {path for file in files.documentation_pages() for path in _OUTSIDE.findall(file.content_string)}
    for path in sorted(outside):
        files.append(File.generated(config, path, abs_src_path=str(HERE.parent / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Append the generated tables of a page; lead links out of this folder to the copies, and to generated pages."""
    if page.file.src_uri in _APPENDED:
        markdown = f"{markdown}\n{_APPENDED[page.file.src_uri]()}"
    up = "../" * page.file.src_uri.count("/")
    markdown = _SOURCE.sub(lambda match: f"]({up}{_GENERATED[match[1]]})", markdown)
    return _OUTSIDE.sub(rf"]({up}\1)", markdown)


_TABLE, _CODE = re.compile(r"<table>.*?</table>", re.DOTALL), re.compile(r"<code>[^<]*</code>")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    r"""Show the `\|` of code in a table as GitHub does, without the escape."""
    return _TABLE.sub(lambda table: _CODE.sub(lambda code: code[0].replace(r"\|", "|"), table[0]), html)
