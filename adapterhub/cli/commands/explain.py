"""`adapterhub explain`."""

from __future__ import annotations

import difflib

import click

from adapterhub.cli import output
from adapterhub.cli.errors import codes, explanation
from adapterhub.cli.options import Settings, command
from adapterhub_converters.errors import NotFoundError


@command(
    "explain",
    example="""
    adapterhub explain rank-config
    adapterhub explain
    adapterhub explain no-such-tag --json""",
)
@click.argument("code", required=False)
@click.pass_obj
def explain(settings: Settings, code: str | None) -> None:
    """Explain a code of a check or an error: what it means, and what to do.

    Codes are printed in brackets: error[rank-config] in a report, [no-such-tag] at the end of an error. Without CODE, all
    codes are listed.
    """
    if code is None:
        found = [one for one in map(explanation, codes()) if one]
        rows = [[one.code, one.kind, one.meaning or one.text.partition(". ")[0].rstrip(".")] for one in found]
        columns = [output.Column("CODE"), output.Column("KIND"), output.Column("MEANING", wrap=True)]
        document = {"codes": [one._asdict() for one in found]}
        output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(columns, rows))
        return
    one = explanation(code)
    if one is None:
        close = difflib.get_close_matches(code, codes(), 1)
        hint = f"Did you mean {close[0]}?" if close else "`adapterhub explain` lists them"
        raise NotFoundError(code[:80], "no such code", hint)

    def text() -> None:
        article = "a" if one.kind != "error" else "an"
        output.write(
            f"{one.code}: {article} {one.kind}{f' reported by `adapterhub {one.reported_by}`' if one.reported_by else ''}"
        )
        for paragraph in (one.meaning and f"{one.meaning[0].upper()}{one.meaning[1:]}.", one.text, one.fix and f"{one.fix}."):
            if paragraph:
                output.write()
                output.write_lines(output.wrapped(paragraph, output.width()))

    output.emit(one._asdict(), as_json=settings.as_json, text=text)
