"""Rows of the usual columns -> what is context and what is to be written: plain texts, or chats by a template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from diloco.examples import Example, Piece, Text
from diloco.files import Row

Message: TypeAlias = Mapping[str, Any]  # role and content
Render: TypeAlias = Callable[[Sequence[Message], bool], str]  # with or without the head of an answer to come


def completions(rows: Iterable[Row], render: Render | None, *, domain_field: str) -> Iterator[Example]:
    """Rows with `prompt` and `completion`, or with `messages`, of which every answer of the assistant is a target.

    `render`: the tokenizer's chat template, where it has one. Raises ValueError for a row that has neither.
    """
    for row in rows:
        if _is_chat(row.values.get("messages")):
            text = _conversation(row, "messages", row.values["messages"], render)
        else:
            _need(row, ("prompt", "completion"), "or messages, a list of role and content")
            text = _completed(row, "prompt", "completion", render)
        yield _example(row, [text], domain_field)


def pairs(rows: Iterable[Row], render: Render | None, *, domain_field: str) -> Iterator[Example]:
    """Rows with `prompt`, `chosen` and `rejected`: two texts each, the better one first.

    Chats may leave out `prompt`: it is what both begin with. Raises ValueError for rows that lack a column, whose
    completions are equal, or whose chats have no prompt in common.
    """
    for row in rows:
        values = row.values
        _need(row, ("chosen", "rejected"), "with prompt")
        if values["chosen"] == values["rejected"]:
            raise ValueError(f"{row.place}: chosen and rejected are equal: take the row out")
        if values.get("prompt") is None:
            row = _with_common_prompt(row)
        yield _example(row, [_completed(row, "prompt", name, render) for name in ("chosen", "rejected")], domain_field)


def labelled(rows: Iterable[Row], render: Render | None, *, domain_field: str) -> Iterator[Example]:
    """Rows with `prompt`, `completion` and `label`, true or false. Raises ValueError for a row that lacks one."""
    for row in rows:
        _need(row, ("prompt", "completion", "label"), "that is true or false")
        if not isinstance(row.values["label"], bool):
            raise ValueError(f"{row.place}: label is {row.values['label']!r}, and must be true or false")
        text = _completed(row, "prompt", "completion", render)
        yield _example(row, [text], domain_field, json.dumps({"label": row.values["label"]}))


def prompts(rows: Iterable[Row], render: Render | None, *, domain_field: str) -> Iterator[Example]:
    """Rows with `prompt`, for completions that are yet to be written."""
    for row in rows:
        _need(row, ("prompt",), "a text or a list of messages")
        prompt = row.values["prompt"]
        chat = _is_chat(prompt)
        text = _template(row, render)(prompt, True) if chat else _text(row, "prompt")
        columns = json.dumps(dict(row.values), default=str)
        yield _example(row, [[Piece(text, False, chat)]], domain_field, columns)


def _example(row: Row, texts: list[Text], domain_field: str, columns: str = "") -> Example:
    if domain_field and row.values.get(domain_field) is None:
        raise ValueError(f"{row.place} has no {domain_field!r} (data.domain_field): mend the row, or leave that out")
    domain = str(row.values[domain_field]) if domain_field else row.place.rpartition(": row ")[0]
    special = texts[0][0].special
    return Example(place=row.place, texts=texts, domain=domain, ends=not special, made=row.made, columns=columns)


def _completed(row: Row, prompt: str, completion: str, render: Render | None) -> Text:
    """The texts under these two columns, or their chats one after the other."""
    given, wanted = row.values[prompt], row.values[completion]
    if not _is_chat(given) and not _is_chat(wanted):
        return [Piece(_text(row, prompt), False), Piece(_text(row, completion, empty=False), True)]
    if not _is_chat(given) or not _is_chat(wanted):
        raise ValueError(f"{row.place}: {prompt} and {completion} must both be texts, or both lists of messages")
    return _conversation(row, completion, [*given, *wanted], render, given=len(given))


def _conversation(row: Row, column: str, messages: Sequence[Message], render: Render | None, *, given: int = 0) -> Text:
    """A chat as its template writes it; the assistant's messages from the `given`-th on are targets."""
    template = _template(row, render)
    pieces: list[Piece] = []
    written = ""
    answers = [i for i, message in enumerate(messages) if i >= given and message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{row.place}: {column} has no message of the role assistant, and nothing to learn")
    for index in answers:
        before, after = template(messages[:index], True), template(messages[: index + 1], False)
        if not before.startswith(written) or not after.startswith(before):
            raise ValueError(
                f"{row.place}: the chat template writes message {index + 1} of {column} in another way once more"
                " follow, so that no target can be told: use one that only appends, or plain prompt and completion"
            )
        pieces += [Piece(before[len(written) :], False, True), Piece(after[len(before) :], True, True)]
        written = after
    return pieces


def _with_common_prompt(row: Row) -> Row:
    """A row of two chats, whose first messages are the same, with these as its prompt."""
    chosen, rejected = row.values["chosen"], row.values["rejected"]
    if not _is_chat(chosen) or not _is_chat(rejected):
        raise ValueError(f"{row.place} has no prompt: give one (only chats may leave it out)")
    common = 0
    for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
        if left != right:
            break
        common += 1
    if common == 0:
        raise ValueError(f"{row.place}: chosen and rejected begin with different messages: give a prompt")
    return Row(
        place=row.place,
        values={**row.values, "prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]},
    )


def _need(row: Row, columns: Sequence[str], more: str) -> None:
    missing = [name for name in columns if row.values.get(name) is None]
    if missing:
        present = ", ".join(key for key, value in row.values.items() if value is not None) or "none"
        raise ValueError(
            f"{row.place} has no {' and no '.join(missing)} (it has: {present}): rows need {', '.join(columns)} {more}"
        )


def _text(row: Row, column: str, *, empty: bool = True) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise ValueError(f"{row.place}: {column} is neither a text nor a list of messages with role and content")
    if not value and not empty:
        raise ValueError(f"{row.place}: {column} is empty: take the row out")
    return value


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def _template(row: Row, render: Render | None) -> Render:
    if render is None:
        raise ValueError(
            f"{row.place} is a chat, and the tokenizer has no chat template: use plain texts as prompt and completion,"
            " or a workload.model whose tokenizer has one"
        )
    return render
