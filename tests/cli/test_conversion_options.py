"""The options of a conversion: the format that was probably meant, and losses only where a format is named."""

from __future__ import annotations

import pytest

from adapterhub.cli.conversion_options import split_drops
from tests.conftest import Run


def test_a_mistyped_format_names_the_one_that_was_meant(run: Run) -> None:
    error = run("convert", "sql", "x", "--to", "guff", code=2).stderr
    assert error.endswith("Did you mean gguf?  [invalid-usage]\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("options", ["--dtype f16", "--allow-approx", "--allow-drop norms"])
@pytest.mark.parametrize("command", ["pull team/a", "push sql team/a"])
def test_a_loss_is_allowed_only_with_a_format(run: Run, command: str, options: str) -> None:
    error = run(*command.split(), *options.split(), code=2).stderr
    assert error.startswith("error: --to: is required by --dtype, --allow-approx and --allow-drop.")


def test_what_to_drop_may_be_separated_by_commas_and_repeated() -> None:
    assert split_drops(["norms, biases", "rows,"]) == ("norms", "biases", "rows")
