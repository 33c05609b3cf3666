"""What the environment says: `Words` for a tiny agent (``terse``) and for a language model (``english``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

SIGNS = (
    *("anchor", "arrow", "bell", "candle", "crown", "drum", "feather", "flag"),
    *("hammer", "key", "ladder", "lantern", "moon", "rope", "shell", "wheel"),
)
COLOURS = ("red", "blue", "green", "white", "black", "gold")

Rules = Mapping[str, str]
"""Sign -> its colour."""


class Words(Protocol):
    """A wording of the game. Part of the panels' fingerprint, as the texts of one example."""

    def prompt(self, first: str, count: int) -> str:
        """The task: `count` signs, of which this is the first."""
        ...

    def observation(self, *, right: bool, told: str | None, sign: str, following: str | None) -> str:
        """The answer to a colour.

        Args:
            told: the colour that would have been right, if a wrong answer is told.
            following: the next sign; None at the end.
        """
        ...

    def rules(self, rules: Sequence[tuple[str, str]]) -> str:
        """Signs with their colours, for a skill."""
        ...

    def exclusions(self, wrong: Sequence[tuple[str, str]]) -> str:
        """Signs with colours that they don't have, for a skill."""
        ...

    def answer(self, action: str) -> str | None:
        """The colour that an action names; None if it names none, or several."""
        ...


class Terse:
    """A word each: for a model with the game's words as its vocabulary."""

    def prompt(self, first: str, count: int) -> str:
        return f"Sign: {first}"

    def observation(self, *, right: bool, told: str | None, sign: str, following: str | None) -> str:
        verdict = "Yes" if right else f"No {told}" if told else "No"
        return f"{verdict} {following or 'End'}"

    def rules(self, rules: Sequence[tuple[str, str]]) -> str:
        return " ".join(f"{sign} {colour}" for sign, colour in rules)

    exclusions = rules

    def answer(self, action: str) -> str | None:
        return word if (word := action.strip()) in COLOURS else None


class English:
    """Sentences: for a language model."""

    def prompt(self, first: str, count: int) -> str:
        colours = ", ".join(COLOURS[:-1]) + f" or {COLOURS[-1]}"
        return (
            f"Every sign in this house belongs to one colour: {colours}. The rules are hidden, but they never change. "
            f"You will see {count} signs, one at a time. Answer each with its colour, in one word.\n\n"
            f"The first sign is the {first}. Which colour?"
        )

    def observation(self, *, right: bool, told: str | None, sign: str, following: str | None) -> str:
        verdict = "Right." if right else f"Wrong. The {sign} is {told}." if told else "Wrong."
        return f"{verdict} " + (
            f"The next sign is the {following}. Which colour?" if following else "That was the last."
        )

    def rules(self, rules: Sequence[tuple[str, str]]) -> str:
        return " ".join(f"The {sign} is {colour}." for sign, colour in rules)

    def exclusions(self, wrong: Sequence[tuple[str, str]]) -> str:
        return " ".join(f"The {sign} is not {colour}." for sign, colour in wrong)

    def answer(self, action: str) -> str | None:
        words = "".join(character if character.isalpha() else " " for character in action.lower()).split()
        named = {word for word in words if word in COLOURS}
        return named.pop() if len(named) == 1 else None


WORDINGS: Mapping[str, Words] = {"terse": Terse(), "english": English()}
