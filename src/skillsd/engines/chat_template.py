"""What an engine has to know of a tokenizer's chat template: which one it is, and the token that ends a turn."""

from __future__ import annotations

import re
from typing import Any

from skillsd.errors import UserError

_REPLY, _NEXT = "\u27e6reply\u27e7", "\u27e6next\u27e7"  # placeholders for messages; no template writes them by itself
_TAG = re.compile(r"[<\[\u25c1].*[>\]\u25b7]", re.DOTALL)


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, in Jinja.

    Raises:
        UserError: if it has none, or several of which none is the default.
    """
    templates = tokenizer.chat_template
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if templates is None:
        raise UserError(f"the tokenizer of {name!r} has no chat template: give an instruction-tuned model")
    if isinstance(templates, dict):
        if "default" not in templates:
            raise UserError(
                f"the tokenizer of {name!r} has several chat templates, none of which is called 'default': "
                f"{', '.join(sorted(templates))}. Write one of them to chat_template.jinja in the model's folder"
            )
        return str(templates["default"])
    return str(templates)


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that are more than their text: special ones, and tags (Qwen3's ``<think>``)."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if token.special or _TAG.fullmatch(token.content)}


def separator(tokenizer: Any, template: str, **kwargs: Any) -> str | None:
    """What the template writes between a reply and the text of the next message; None if it can't be found out."""
    dialogue = [("user", "x"), ("assistant", _REPLY), ("user", _NEXT)]
    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in dialogue],
            chat_template=template, tokenize=False, add_generation_prompt=True, **kwargs,
        )  # fmt: skip
    except Exception:  # a template may raise any type; the renderer reports it
        return None
    _, replied, rest = text.partition(_REPLY)
    between, followed, _ = rest.partition(_NEXT)
    return between if replied and followed else None


def first_control_token(text: str, tokens: dict[str, int]) -> tuple[str, int] | None:
    """The control token that comes first in `text`, and its id."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    found = re.search("|".join(map(re.escape, longest_first)), text) if longest_first else None
    return (found[0], tokens[found[0]]) if found else None


def end_of_turn(tokenizer: Any) -> int | None:
    """The control token with which the template ends a reply, or begins the next message if it does not end replies.

    None if it writes none. A model that was trained with the template samples this token where its turn ends.
    """
    between = separator(tokenizer, chat_template(tokenizer))
    found = first_control_token(between, control_tokens(tokenizer)) if between else None
    return found[1] if found else None
