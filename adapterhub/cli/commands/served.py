"""`adapterhub served`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output
from adapterhub.cli.options import Settings, command, usage_file_option
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import registry_folder
from adapterhub_converters.errors import NotFoundError

if TYPE_CHECKING:
    from adapterhub.serve.usage.answer_log import AnswerRecord, Feedback
    from adapterhub.serve.usage.record_place import Place

_ANSWERS = (
    Column("WHEN"),
    Column("VERSION"),
    Column("ROUTE", drop=2),
    Column("ARM", drop=3),
    Column("KEY", drop=4),
    Column("STATUS", right=True, drop=5),
    Column("TOKENS", right=True, drop=6),
    Column("SCORE", right=True, drop=7),
)


@command(
    "served",
    example="""
    adapterhub served chatcmpl-8f2c
    adapterhub served 4be1fd2c90b3a7d1 --json""",
)
@click.argument("ident", metavar="ID")
@usage_file_option("what `adapterhub serve` recorded.")
@click.pass_obj
def served(settings: Settings, *, ident: str, usage_place: Place | None) -> None:
    """Show which version gave an answer, by which route and arm, for which key, when, and with how many tokens.

    ID is the `id` of the answer, or the x-request-id of its headers, which a client may have used several times. Answers of the
    last half second may be missing. No text is recorded.
    """
    from adapterhub.serve.usage import answer_log, record_place

    place = usage_place or registry_folder(settings) / record_place.FILE
    answers = answer_log.find_answers(place, ident)
    if not answers:
        raise NotFoundError(ident[:200], f"no such answer in {place}", "Look at another record", code="no-such-answer")
    document = {"answers": [_document(*answer) for answer in answers]}
    rows = [_cells(*answer) for answer in answers]
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(_ANSWERS, rows))


def _document(answer: AnswerRecord, feedback: Feedback | None) -> dict[str, Any]:
    texts = {"label": feedback.label or None, "comment": feedback.comment or None} if feedback else {}
    return {
        **asdict(answer),
        "time": output.utc_time(answer.time),
        "feedback": {"score": feedback.score, **texts} if feedback else None,
    }


def _cells(answer: AnswerRecord, feedback: Feedback | None) -> list[str]:
    texts = [output.pinned(answer.version), answer.route, answer.arm, answer.key]
    numbers = [str(answer.status), f"{answer.prompt_tokens}+{answer.answer_tokens}", f"{feedback.score:g}" if feedback else "-"]
    return [output.utc_time(answer.time), *(output.one_line(text) or "-" for text in texts), *numbers]
