"""`adapterhub explain`."""

from __future__ import annotations

import difflib

import click

from adapterhub.cli import output
from adapterhub.cli.completions import completions
from adapterhub.cli.explained_codes import codes, explanation
from adapterhub.cli.options import Settings, command
from adapterhub_converters.errors import NotFoundError


@command(
    "explain",
    example="""
    adapterhub explain rank-config
    adapterhub explain
    adapterhub explain no-such-tag --json""",
)
@click.argument("code", required=False, shell_complete=lambda _context, _parameter, typed: completions(codes(), typed))
@click.pass_obj
def explain(settings: Settings, code: str | None) -> None:
    """Explain a code of a check or an error: what it means, and what to do.

    Codes are printed in brackets: error[rank-config] in a report, [no-such-tag] at the end of an error. Without CODE, all
    codes are listed.
    """
    if code is None:
        explanations = [explanation_ for explanation_ in map(explanation, codes()) if explanation_]
        rows = [
            [explanation_.code, explanation_.kind, explanation_.meaning or explanation_.text.partition(". ")[0].rstrip(".")]
            for explanation_ in explanations
        ]
        columns = [output.Column("CODE"), output.Column("KIND"), output.Column("MEANING", wrap=True)]
        document = {"codes": [explanation_._asdict() for explanation_ in explanations]}
        output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(columns, rows))
        return
    item = explanation(code)
    if item is None:
        close = difflib.get_close_matches(code, codes(), 1)
        hint = f"Did you mean {close[0]}?" if close else "`adapterhub explain` lists them"
        raise NotFoundError(code[:80], "no such code", hint)

    def text() -> None:
        article = "a" if item.kind != "error" else "an"
        output.write(
            f"{item.code}: {article} {item.kind}{f' reported by `adapterhub {item.reported_by}`' if item.reported_by else ''}"
        )
        for paragraph in (
            item.meaning and f"{item.meaning[0].upper()}{item.meaning[1:]}.",
            item.text,
            item.fix and f"{item.fix}.",
        ):
            if paragraph:
                output.write()
                output.write_lines(output.wrap(paragraph, output.width()))

    output.emit(item._asdict(), as_json=settings.as_json, text=text)
