"""`adapterhub train --init` and `--explain`: a config to begin with, and why its defaults are what they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from adapterhub.cli import output
from adapterhub.cli.options import Settings
from adapterhub_converters.errors import LocalIOError, OutputExistsError


def init(settings: Settings, path: str) -> int:
    """Write a config with every key; nothing is overwritten."""
    from adapterhub.train import explain

    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(explain.template())
    except FileExistsError as error:
        raise OutputExistsError(path) from error
    except OSError as error:
        raise LocalIOError(path, error.strerror or str(error)) from error
    text = f"made {path}; fill in its paths, then run `adapterhub train {path}`"
    output.emit({"config": str(Path(path))}, as_json=settings.as_json, text=lambda: output.write(text))
    return 0


def explain(settings: Settings, wanted: str) -> int:
    """Say what the keys are for."""
    from adapterhub.train import explain as known

    found = known.explain(wanted or None)

    def text() -> None:
        for number, item in enumerate(found):
            if number:
                output.write()
            default = f" = {item.default}" if item.default else ", needed" if item.needed else ", not set by default"
            output.write(f"[{item.section}] {item.key}{default}")
            for line in output.wrapped(item.why, output.width()):
                output.write(line)

    output.emit({"keys": [dataclasses.asdict(item) for item in found]}, as_json=settings.as_json, text=text)
    return 0
