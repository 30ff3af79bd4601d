"""NextToken: a judge's question to a policy, how probable words are as the token after a text. No torch.

policy.next_token_logprobs([NextToken(tree, Prompt(messages=...), "Verdict:")], ["yes", "no"])
-> [{"yes": -0.2, "no": -1.9}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from .checks import shown
from .prompt import Prompt
from .tokens import TokenText, encode_text
from .tree import Node, SearchTree

_spellings: WeakKeyDictionary[TokenText, dict[str, list[int]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class NextToken:
    """The place behind a prompt and the beginning of its answer.

    Args:
        tree: a search tree: what is encoded counts on its meter, and is kept until the policy releases it.
        prompt: what is asked, as text, chat messages or the policy's token ids.
        answer: text of the answer so far, or of what follows in it on `drawn`; "" for none.
        drawn: a node that this policy sampled after this prompt: the answer begins with its path, in the tokens that
            were drawn, but for a hidden stop string and control tokens at its end. None for an answer of text alone.

    Raises:
        TypeError: a field is of another kind.
    """

    tree: SearchTree
    prompt: Prompt
    answer: str = ""
    drawn: Node | None = None

    @property
    def text(self) -> str:
        """The whole answer so far."""
        return ("" if self.drawn is None else self.drawn.path_text()) + self.answer

    def __post_init__(self) -> None:
        kinds = (("tree", SearchTree), ("prompt", Prompt), ("answer", str), ("drawn", Node | None))
        for name, kind in kinds:
            value = getattr(self, name)
            if not isinstance(value, kind):
                needed = getattr(kind, "__name__", "Node or None")
                raise TypeError(f"{name}={shown(value)}: a {needed} is needed, not {type(value).__name__}")


def check_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return words to ask for.

    Raises:
        TypeError: they are not a list of strings.
        ValueError: there are none, one is empty or has white space around it, or two differ in case alone.
    """
    if isinstance(words, str | bytes) or not isinstance(words, Sequence):
        raise TypeError(f"words={shown(words)}: a list of strings is needed, not {type(words).__name__}")
    for place, word in enumerate(words):
        if not isinstance(word, str):
            raise TypeError(f"words[{place}]={shown(word)}: a string is needed, not {type(word).__name__}")
        if not word or word != word.strip():
            raise ValueError(f"words[{place}]={word!r}: a word without white space around it is needed")
    if not words or len({word.casefold() for word in words}) < len(words):
        raise ValueError(f"words={shown(words)}: one or more words are needed that differ in more than case")
    return tuple(words)


def spelled_word(text: str) -> str:
    """Return the word that a token of this text spells: without white space around it, in whatever case."""
    return text.strip().casefold()


def word_ids(token_text: TokenText, words: Sequence[str], vocab: int) -> dict[str, list[int]]:
    """Token ids that spell each word by themselves: its text in any case, perhaps with white space around it.

    Args:
        token_text: of the policy's tokenizer.
        words: see check_words.
        vocab: tokens of the policy's head.

    Raises:
        ValueError: no token spells a word.
    """
    known = _spellings.get(token_text)
    if known is None:
        known = _spellings[token_text] = {}
        size = max((int(i) for i in token_text.tokenizer.get_vocab().values()), default=-1) + 1
        for token in range(size):
            if token not in token_text.special:
                spelled = spelled_word(token_text.piece(token).decode("utf-8", "replace"))
                known.setdefault(spelled, []).append(token)
    ids = {word: [token for token in known.get(spelled_word(word), ()) if token < vocab] for word in words}
    for word, tokens in ids.items():
        if not tokens:
            raise ValueError(f"words: no token of the policy's vocabulary spells {word!r}; choose a shorter word")
    return ids


def answer_ids(ask: NextToken, token_text: TokenText) -> list[int]:
    """Token ids of an ask's answer: those that were drawn, then its text as it goes on after them."""
    if ask.drawn is None:
        return encode_text(token_text.tokenizer, ask.answer, token_text)
    path = ask.drawn.path()
    visible = sum(len(step.text_bytes) for step in path) - ask.drawn.hidden
    ids: list[int] = []
    rest = b""
    for token in ask.drawn.path_ids():
        piece = b"" if token in token_text.special else token_text.piece(token)
        if len(piece) > visible:  # a stop string begins inside it
            rest = piece[:visible]
            break
        ids.append(token)
        visible -= len(piece)
    while ids and ids[-1] in token_text.special:
        ids.pop()
    return ids + encode_text(token_text.tokenizer, rest.decode("utf-8", "replace") + ask.answer, token_text)


def read_words(top: Mapping[str, float], words: Sequence[str]) -> dict[str, float]:
    """Log-probabilities of words from those of single tokens by their text, as an endpoint gives its most probable.

    Args:
        top: text of a token -> nats.
        words: see check_words.

    Returns:
        word -> nats, the sum over its tokens; words that none of the tokens spells are left out.
    """
    return sum_words([(spelled_word(text), value) for text, value in top.items()], words)


def sum_words(tokens: Sequence[tuple[str, float]], words: Sequence[str]) -> dict[str, float]:
    """As read_words, of (spelled word, nats) pairs."""
    import numpy as np

    logprobs: dict[str, float] = {}
    for word in words:
        parts = [value for spelled, value in tokens if spelled == spelled_word(word)]
        if parts:
            logprobs[word] = float(np.logaddexp.reduce(np.asarray(parts, np.float64)))
    return logprobs
