"""Encoding: prompts and responses as token ids, and what two tokenizers have in common. No torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from ..checks import characters
from ..prompt import Prompt
from .private_tokenizer import private_tokenizer
from .token_text import TokenText

_LEADS = ("\n", ".", "a")  # what a text may be put after, to be tokenised as it goes on
_PROBE = Prompt(text="A b\n")  # shows begin-of-sequence tokens and spaces that a tokenizer puts before a text

Literal = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
_literals: WeakKeyDictionary[TokenText, Literal] = WeakKeyDictionary()


@dataclass(frozen=True)
class TokenizerMatch:
    """The common part of a pair's tokenizer and a policy's.

    Attributes:
        tokens: one vocabulary: an id is the same token in both. Embeddings may be padded to different widths.
        prompts: prompts come out as the same ids too: same chat template, same begin of sequence.
    """

    tokens: bool
    prompts: bool

    @classmethod
    def of(cls, ours: Any, theirs: Any) -> TokenizerMatch:
        """Compare two tokenizers. A pair's tokenizer without a chat template takes the policy's."""
        if ours is theirs:
            return cls(True, True)
        if ours.get_vocab() != theirs.get_vocab():
            return cls(False, False)
        template = getattr(ours, "chat_template", None)
        same_template = template is None or template == getattr(theirs, "chat_template", None)
        return cls(True, same_template and encode_prompt(ours, _PROBE) == encode_prompt(theirs, _PROBE))


def _ids(tokenizer: Any, text: str | None, **options: Any) -> list[int]:
    """Token ids of a text, independent of other threads' settings of the tokenizer. Raises ValueError for half a
    character."""
    characters("the text", text or "")
    return [int(i) for i in private_tokenizer(tokenizer)(text, **options)["input_ids"]]


def encode_prompt(tokenizer: Any, prompt: Prompt, whose: str = "the tokenizer") -> tuple[int, ...]:
    """Token ids of a prompt under a tokenizer.

    Tokens that a tokenizer puts behind a text by itself (an end of sequence) are left out: a response goes on from
    here.

    Args:
        tokenizer: a transformers tokenizer; not used where the prompt has ids.
        prompt: the prompt.
        whose: the tokenizer, for messages.

    Raises:
        ValueError: there are no tokens, or the prompt is chat messages and the tokenizer has no chat template.
    """
    if prompt.token_ids is not None:
        ids = list(prompt.token_ids)
    elif prompt.messages is not None:
        if getattr(tokenizer, "chat_template", "") is None:
            raise ValueError(
                f"{whose} has no chat template to render chat messages with: set its chat_template, or give the prompt "
                "as text (Prompt(text=...))"
            )
        chat = [dict(m) for m in prompt.messages]
        if private_tokenizer(tokenizer) is tokenizer:
            encoding = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
            ids = list(encoding["input_ids"])
        else:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            ids = _ids(tokenizer, text, add_special_tokens=False)
    else:
        ids = _ids(tokenizer, prompt.text)
        if ids and ids[-1] in tokenizer.all_special_ids:
            own = _ids(tokenizer, prompt.text, add_special_tokens=False)
            behind = (n for n in range(len(ids) - len(own) + 1) if ids[len(ids) - n - len(own) : len(ids) - n] == own)
            ids = ids[: len(ids) - next(behind, 0)]
    if len(ids) == 0:
        raise ValueError("empty prompt: at least one token is needed")
    return tuple(int(i) for i in ids)


def encode_text(tokenizer: Any, text: str, token_text: TokenText | None = None) -> list[int]:
    """Token ids of a response's text, as it goes on after its prompt. Control tokens spelled in it are ordinary text.

    Tokenizers of the sentencepiece kind put a space before a text's first word. The ids have to spell the text exactly.
    Candidates are the ids of the text without its leading space, and the ids that the text has after something else. If
    no candidate does (a tokenizer that normalises), the tokenizer's own encoding stands.

    Args:
        tokenizer: a transformers tokenizer.
        text: the response, or its beginning.
        token_text: the tokenizer's TokenText, to save making it.
    """
    token_text = token_text or TokenText(tokenizer)

    def encode(part: str) -> list[int]:
        return _encode(token_text, part)

    def spelt(ids: Sequence[int]) -> bytes:
        return b"".join(map(token_text.piece, ids))

    ids, wanted = encode(text), text.encode()
    if spelt(ids) != b" " + wanted:
        return ids
    if text.startswith(" ") and spelt(shorter := encode(text[1:])) == wanted:
        return shorter
    names = tuple(name for i in token_text.special if len(name := token_text.piece(i)) > 1)
    for lead in _LEADS:
        if (lead.encode() + wanted).startswith(names):
            continue  # the two together would spell a control token
        before, whole = encode(lead), encode(lead + text)
        if whole[: len(before)] == before and spelt(whole[len(before) :]) == wanted:
            return whole[len(before) :]
    return ids


def _encode(token_text: TokenText, text: str) -> list[int]:
    """Token ids of a text by itself. A control token that is spelled in the text is encoded as ordinary text."""
    tokenizer = token_text.tokenizer
    ids = _ids(tokenizer, text, add_special_tokens=False) if text else []
    if token_text.special.isdisjoint(ids):
        return ids
    if token_text not in _literals:
        _literals[token_text] = _literal(tokenizer, token_text.special)
    ids, spans = _literals[token_text](text)
    # Vocabularies of whole words and Unigram ones may find the spelling by themselves: a cut inside it ends that.
    unknown = getattr(tokenizer, "unk_token_id", None)
    cuts = []
    for token_id, (start, end) in zip(ids, spans, strict=True):
        if token_id in token_text.special and end - start > 1:
            written = text[start:end].encode("utf-8", "replace")
            if token_id != unknown or written == token_text.piece(token_id):
                cuts.append(start + 1)
    if not cuts:
        return ids
    first, *others = (text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
    return _encode(token_text, first) + [i for part in others for i in encode_text(tokenizer, part, token_text)]


def _literal(tokenizer: Any, special: Collection[int]) -> Literal:
    """A text's token ids with no control token looked for in it, and the characters [start, end) of each control token.

    A copy of the tokenizer's core does it, since others may be using that in other threads. Where there is no core to
    copy, control tokens are found by their spelling.
    """
    try:
        core = copy.deepcopy(tokenizer.backend_tokenizer)
        core.encode_special_tokens = True
        core.no_truncation()
        core.no_padding()
    except Exception:  # no such core, or parts of it are written in Python
        core = None

    def by_core(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = core.encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def by_name(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        except (TypeError, ValueError):  # it knows no such option
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spans, end = [], 0
        for token_id in ids:
            name = str(tokenizer.convert_ids_to_tokens(int(token_id))) if token_id in special else ""
            start = text.find(name, end) if name else -1
            if start >= 0:
                end = start + len(name)
            spans.append((start, end) if start >= 0 else (0, 0))
        return [int(i) for i in ids], spans

    return by_name if core is None else by_core
