"""Layouts of a question and its steps as token ids, as published step PRMs want them.

A layout gives the ids of a path up to and including the position whose hidden row is read, tokenised as the whole
string. Two paths are compared token by token, so a step costs only the tokens that its parent's path does not have,
whatever a layout does; what a later step does not keep, such as an end of sequence, is encoded again by nobody else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

Messages = Sequence[Mapping[str, Any]]
_ASKED = {"role": "user", "content": "q"}  # of self-checks


class Layout(Protocol):
    """Writes paths. Frozen records with these members are layouts; PRMFormat takes any.

    Attributes:
        keeps_end: the token that is read behind a step stands in the paths of later steps too.
    """

    @property
    def keeps_end(self) -> bool: ...

    def check(self, tokenizer: Any) -> None:
        """Raise ValueError where the tokenizer lacks what the layout needs."""
        ...

    def ids(self, tokenizer: Any, question: Messages, steps: Sequence[str]) -> list[int]:
        """Token ids of the question and one or more steps, up to the position that the last step is read at.

        Args:
            tokenizer: the PRM's.
            question: chat messages, the last of them the user's.
            steps: texts without white space around them, none empty.
        """
        ...


def one_token(tokenizer: Any, text: str) -> int:
    """Return the id of a text that is one token by itself. Raises ValueError where it is another number of tokens."""
    known = tokenizer.get_vocab().get(text)
    if known is not None:
        return int(known)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"the tokenizer reads {text!r} as {len(ids)} tokens, where this format needs one")
    return int(ids[0])


def last_token(tokenizer: Any, text: str) -> int:
    """Return the last id of a text's own tokenisation, as published code takes verdict words."""
    return int(tokenizer(text, add_special_tokens=False)["input_ids"][-1])


def plain_question(question: Messages) -> str:
    """Return the text of chat messages that a layout without roles writes: their contents, a line apart."""
    return "\n".join(str(message.get("content", "")) for message in question)


class Spelling:
    """Keeps text from spelling control tokens: a space goes behind the first character of each that it spells.

    Args:
        tokenizer: of the PRM.
        more: further texts that may not be spelled.
    """

    def __init__(self, tokenizer: Any, more: Sequence[str] = ()) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        control = {str(token.content) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
        spelled = sorted((text for text in control | set(more) if len(text) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def plain(self, text: str) -> str:
        """Return the text with its control tokens broken up."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def chat_ids(tokenizer: Any, messages: Messages, *, generation: bool = False) -> list[int]:
    """Return the token ids of a rendered chat."""
    encoded = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=generation, tokenize=True, return_dict=True
    )
    return [int(i) for i in encoded["input_ids"]]


def needs_template(tokenizer: Any) -> None:
    """Raise ValueError where a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template, which this format writes the question with")


def keeps_answers(tokenizer: Any) -> None:
    """Raise ValueError where a template drops or alters what the assistant said."""
    answer = "one two"
    messages = [_ASKED, {"role": "assistant", "content": answer}]
    if answer not in tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False):
        raise ValueError("the chat template drops the assistant's text, which holds the steps")


@dataclass(frozen=True)
class MarkerChat:
    """One assistant turn of steps, a marker token behind each; the marker is read.

    Args:
        marker: a token of the vocabulary.
        system: a system turn where the question has none; None for none.
    """

    marker: str
    system: str | None = None

    keeps_end: ClassVar[bool] = True

    def check(self, tokenizer: Any) -> None:
        """See Layout."""
        marker = one_token(tokenizer, self.marker)
        needs_template(tokenizer)
        keeps_answers(tokenizer)
        # Read as one token wherever it stands, whatever is before it and behind it.
        steps = ["one.", "{2}", "3", "four\n"]
        chat = chat_ids(tokenizer, [_ASKED, {"role": "assistant", "content": self.marker.join([*steps, ""])}])
        if chat.count(marker) != len(steps):
            raise ValueError(
                f"the tokenizer reads {self.marker!r} as other tokens between steps, where this format needs one token"
            )

    def ids(self, tokenizer: Any, question: Messages, steps: Sequence[str]) -> list[int]:
        """See Layout."""
        messages = list(question)
        if self.system is not None and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        answer = self.marker.join(steps) + self.marker
        ids = chat_ids(tokenizer, [*messages, {"role": "assistant", "content": answer}])
        marker = one_token(tokenizer, self.marker)
        return ids[: len(ids) - ids[::-1].index(marker)]


@dataclass(frozen=True)
class MarkerText:
    """Plain text, "question Step 1: ... tag\\nStep 2: ... tag"; the tag is read.

    Args:
        tag: the text behind each step, a space before it; its last token is the marker.
        label: what goes before a step that does not begin with it, with "{i}" for its number; "" for nothing.
        gap: between the question and the first step.
        joint: between a tag and the next step.
    """

    tag: str
    label: str = "Step {i}: "
    gap: str = " "
    joint: str = "\n"

    keeps_end: ClassVar[bool] = True

    def check(self, tokenizer: Any) -> None:
        """See Layout."""
        # Its id depends on the text before it, so it is looked at where it stands.
        alone, tagged, followed = (
            list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in ("x", "x" + self.tag, "x" + self.tag + self.joint + "Step")
        )
        if tagged[:-1] != alone or followed[: len(tagged)] != tagged:
            raise ValueError(f"the tokenizer does not read {self.tag!r} as one token, where this format needs one")

    def ids(self, tokenizer: Any, question: Messages, steps: Sequence[str]) -> list[int]:
        """See Layout."""
        begins = self.label.partition("{i}")[0]
        written = [
            (step if not begins or step.startswith(begins) else self.label.format(i=i) + step) + self.tag
            for i, step in enumerate(steps, 1)
        ]
        text = plain_question(question) + self.gap + self.joint.join(written)
        return [int(i) for i in tokenizer(text)["input_ids"]]


@dataclass(frozen=True)
class VerdictTurns:
    """A user turn for each step, each answered by the same verdict word; the position before the word is read.

    Past verdicts are always the good word, whatever the score was, as in training.

    Args:
        verdict: the assistant's answer.
        first, later: the user's turns, with "{question}" and "{step}".
    """

    verdict: str
    first: str = "{question} {step}"
    later: str = "{step}"

    keeps_end: ClassVar[bool] = True

    def check(self, tokenizer: Any) -> None:
        """See Layout."""
        needs_template(tokenizer)
        keeps_answers(tokenizer)
        # The position that is read is the one before the verdict of an answered turn.
        asked, both = (self.ids(tokenizer, [_ASKED], steps) for steps in (["one"], ["one", "two"]))
        if both[: len(asked)] != asked:
            raise ValueError(
                "the chat template's generation prompt is not what it writes before an assistant's answer, so no "
                "position comes before the verdict"
            )

    def ids(self, tokenizer: Any, question: Messages, steps: Sequence[str]) -> list[int]:
        """See Layout."""
        question_text = plain_question([message for message in question if message.get("role") != "system"])
        messages = [message for message in question if message.get("role") == "system"]
        for i, step in enumerate(steps):
            form = self.later if i else self.first
            if i:
                messages.append({"role": "assistant", "content": self.verdict})
            # Not str.format: a step may hold braces.
            messages.append({"role": "user", "content": _fill(form, question=question_text, step=step)})
        return chat_ids(tokenizer, messages, generation=True)


def _fill(form: str, **parts: str) -> str:
    """Put texts into a form, each once, whatever braces they hold."""
    return re.sub(r"\{(question|step)\}", lambda match: parts[match[1]], form)


@dataclass(frozen=True)
class JoinedIds:
    """Ids of the question, then of each step and of a separator, put together as ids; the separator's last is read.

    Args:
        separator: text behind each step.
        begin: put the begin-of-sequence token first, where the tokenizer has one.
        gap: text behind the question.
        last_only: take the last id of the separator alone.
    """

    separator: str = "\n"
    begin: bool = False
    gap: str = ""
    last_only: bool = False

    keeps_end: ClassVar[bool] = True

    def check(self, tokenizer: Any) -> None:
        """See Layout."""
        if not tokenizer(self.separator, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"the tokenizer reads the separator {self.separator!r} as nothing")

    def ids(self, tokenizer: Any, question: Messages, steps: Sequence[str]) -> list[int]:
        """See Layout."""

        def encode(text: str) -> list[int]:
            return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []

        behind = encode(self.separator)[-1:] if self.last_only else encode(self.separator)
        bos = tokenizer.bos_token_id if self.begin else None
        ids = [] if bos is None else [int(bos)]
        ids += encode(plain_question(question) + self.gap)
        for step in steps:
            ids += encode(step) + behind
        return ids


@dataclass(frozen=True)
class EndOfPrefix:
    """A chat whose answer so far is followed by an end of sequence, which is read and never kept.

    Args:
        system: the system turn.
        asked: the user's turn, with "{question}".
        joint: between steps.
        end: the token that ends a prefix; None for the tokenizer's end of sequence.
    """

    system: str
    asked: str = "{question}"
    joint: str = "\n\n"
    end: str | None = field(default=None)

    keeps_end: ClassVar[bool] = False

    def check(self, tokenizer: Any) -> None:
        """See Layout."""
        needs_template(tokenizer)
        if self.end is None and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end of sequence, which this format reads")

    def ids(self, tokenizer: Any, question: Messages, steps: Sequence[str]) -> list[int]:
        """See Layout."""
        message = _fill(self.asked, question=plain_question(question))
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": message}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text = prompt + self.joint.join(steps)
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return [*ids, int(tokenizer.eos_token_id) if self.end is None else one_token(tokenizer, self.end)]
