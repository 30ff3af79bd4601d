"""A word-level tokenizer for the chains: one token a variable, operation with its operand, result or delimiter.

Decoding inserts nothing, so text and tokens determine each other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .chains import DELIMITER, OPERATIONS, VARIABLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
TOKENS = (PAD, BOS, EOS, UNK, DELIMITER, "?", *VARIABLES, *OPERATIONS, *(f"={d}" for d in range(10)))
IDS = {token: i for i, token in enumerate(TOKENS)}
PAD_ID, BOS_ID, EOS_ID, DELIMITER_ID = IDS[PAD], IDS[BOS], IDS[EOS], IDS[DELIMITER]

_PIECE = r"[a-j]|[+*][0-9]|=[0-9]|[;?]"
_PIECES = re.compile(_PIECE)


def prompt_ids(prompt: str) -> list[int]:
    """Return what the real tokenizer makes of a prompt, BOS included, without its overhead."""
    return [BOS_ID, *(IDS[piece] for piece in _PIECES.findall(prompt))]


def response_ids(response: str) -> list[int]:
    """The token ids of a response that ends, EOS included."""
    return [*(IDS[piece] for piece in _PIECES.findall(response)), EOS_ID]


def text(ids: list[int]) -> str:
    """The text of a response; special tokens vanish."""
    return "".join(TOKENS[i] for i in ids if i > IDS[UNK])


def build() -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it; ``encode`` puts BOS first, as the models expect of a prompt."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocab=dict(IDS), unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
