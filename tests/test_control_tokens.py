"""Control tokens are no text: spelled in a response they stay letters, and what is put behind a prompt is left out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pairs import CHATML, byte_tokenizer, llama, metaspace_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prm_search import HFPolicy, ImplicitPRM, Prompt, SearchTree
from prm_search.tokens import TokenizerMatch, TokenText, encode_prompt, encode_text

SPELLED = ["<|im_end|>", "<pad>", "</s>", "<eos>", "<unk>", "[SEP]", "<s>"]
TEXTS = [f"x {name} y" for name in SPELLED] + [
    "".join(SPELLED),
    "<|im_<|im_end|>end|>",
    "<pad",
    "x" + "<eos></s>" * 400,
]


def unigram():
    """A vocabulary in which the spelling of a control token is a piece like others."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>", "<eos>"], unk_token="<unk>")
    core.train_from_iterator(["so x is y, and the answer is xy: <e o s>"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def words():
    """Whole words, as the demo's vocabulary has them."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "x": 2, "y": 3, "<": 4, "/s>": 5}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(" "), behavior="removed")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer, "metaspace": metaspace_tokenizer, "unigram": unigram, "words": words}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_spelled_control_token_stays_text(name):
    tokenizer = TOKENIZERS[name]()
    pieces = TokenText(tokenizer)
    for text in TEXTS:
        ids = encode_text(tokenizer, text, pieces)
        control = pieces.special.intersection(ids) - {tokenizer.unk_token_id}
        assert not control, (text, tokenizer.convert_ids_to_tokens(ids))
        if name in ("bytes", "metaspace"):  # those that can spell anything
            assert b"".join(map(pieces.piece, ids)).decode() == text
            assert tokenizer.unk_token_id not in ids


def test_text_without_control_tokens_is_encoded_as_the_tokenizer_does():
    tokenizer = byte_tokenizer()
    text = "Step 1: add seven.\n\n<think> the answer"
    assert encode_text(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled = "Step 1<pad>: add</s>"
    split = byte_tokenizer()(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert encode_text(tokenizer, spelled) == split
    assert tokenizer("<pad>")["input_ids"] == [tokenizer.pad_token_id]  # the shared tokenizer is as it was


def test_a_tokenizer_without_a_core_is_cut_where_it_finds_one():
    """Slow tokenizers and those of other libraries: their own encoding, split inside each spelling."""
    core = byte_tokenizer()

    class Plain:
        all_special_ids = core.all_special_ids
        eos_token_id, unk_token_id, chat_template = core.eos_token_id, None, None

        def convert_ids_to_tokens(self, token_id):
            return core.convert_ids_to_tokens(token_id)

        def encode(self, text, add_special_tokens=True):
            return self(text)["input_ids"]

        def decode(self, ids, **options):
            return core.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": core(text, add_special_tokens=add_special_tokens)["input_ids"]}

    tokenizer = Plain()
    pieces = TokenText(tokenizer)
    for text in ("a <pad> b", "<pad></s><pad>", "</s>" * 50):
        ids = encode_text(tokenizer, text, pieces)
        assert pieces.special.isdisjoint(ids)
        assert b"".join(map(pieces.piece, ids)).decode() == text


def test_score_and_the_inexact_mode_keep_them_text():
    own, theirs = byte_tokenizer(), metaspace_tokenizer()
    pair = ImplicitPRM(llama(1), llama(2), tokenizer=own)
    texts = ["It is <pad> here", "It<|im_end|> is", "It is<|im_end|>"]
    scores = pair.score(["What?"] * 3, texts)
    assert [s.token_ids.count(pair.eos_token_id) for s in scores] == [1, 1, 1]
    assert all(s.token_ids[-1] == pair.eos_token_id for s in scores)
    assert own.pad_token_id not in scores[0].token_ids
    assert [s.text for s in scores] == [texts[0] + "<|im_end|>", texts[1] + "<|im_end|>", texts[2]]
    (open_end,) = pair.score(["What?"], texts[2:], append_eos=False)
    assert TokenText(own).special.isdisjoint(open_end.token_ids)

    policy = SimpleNamespace(id="other", tokenizer=theirs, stop_ids={theirs.eos_token_id})
    pair.bind(policy)
    tree = SearchTree(Prompt(text="What?"))
    first = tree.add(tree.root, theirs("It is <|im_end|> and", add_special_tokens=False)["input_ids"])
    last = tree.add(
        first, [*theirs(" <pad>", add_special_tokens=False)["input_ids"], theirs.eos_token_id], finish="stop"
    )
    pair.score_nodes([last])
    ids = [*first.reward_ids["prm"], *last.reward_ids["prm"]]
    assert [i for i in ids if i in TokenText(own).special] == [pair.eos_token_id]
    assert ids[-1] == pair.eos_token_id


def closing(name="</s>"):
    """A tokenizer that puts an end of sequence behind every text."""
    tokenizer = byte_tokenizer(eos=name)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<pad> $A {name}", special_tokens=[("<pad>", 0), (name, tokenizer.convert_tokens_to_ids(name))]
    )
    return tokenizer


def test_what_a_tokenizer_puts_behind_a_prompt_is_left_out():
    tokenizer = closing()
    eos = tokenizer.eos_token_id
    assert tokenizer("What is it?")["input_ids"][-1] == eos
    ids = encode_prompt(tokenizer, Prompt("What is it?"))
    assert ids == (0, *byte_tokenizer()("What is it?")["input_ids"])
    assert encode_prompt(tokenizer, Prompt("ends</s>"))[-2:] == (*encode_prompt(tokenizer, Prompt("ends"))[-1:], eos)
    assert encode_prompt(byte_tokenizer(), Prompt("<|im_start|>"))[-1:] == (1,)
    assert HFPolicy(llama(3), tokenizer).encode(Prompt("What is it?")) == ids
    pair = ImplicitPRM(llama(1), llama(2), tokenizer=tokenizer)
    by_text, by_ids = pair.score(["What is it?", list(ids)], ["It is"] * 2)
    assert by_text.token_rewards.tolist() == by_ids.token_rewards.tolist()
    plain = byte_tokenizer(eos="</s>")
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    assert TokenizerMatch.of(tokenizer, plain) == TokenizerMatch(True, True)


def test_messages_without_a_chat_template_name_whose_it_is():
    messages = [{"role": "user", "content": "What is it?"}]
    bare = metaspace_tokenizer()
    bare.chat_template = None
    pair = ImplicitPRM(llama(1, vocab=448), llama(2, vocab=448), tokenizer=bare, name="judge")
    policy = HFPolicy(llama(3), byte_tokenizer(template=CHATML))
    pair.bind(policy)
    tree = SearchTree(Prompt(messages=messages))
    tree.prompt = tree.prompt.with_ids(policy.encode(tree.prompt))
    node = tree.add(tree.root, [20, 21])
    with pytest.raises(
        ValueError, match=r"the tokenizer of pair 'judge', not the policy's, has no chat template.*as text"
    ):
        pair.score_nodes([node])
    with pytest.raises(ValueError, match=r"prompts\[0\]: the tokenizer of pair 'judge' has no chat template"):
        pair.score([messages], ["It is"])
    with pytest.raises(ValueError, match="the policy's tokenizer has no chat template"):
        HFPolicy(llama(3), byte_tokenizer(template=None)).encode(Prompt(messages=messages))
    pair.tokenizer.chat_template = CHATML
    pair.score_nodes([node])
    assert node.reward_ids["judge"]


def test_a_pair_of_one_vocabulary_without_a_template_takes_the_policys_messages():
    """Also where its prompts begin in another way than the policy's."""
    messages = [{"role": "user", "content": "What is it?"}]
    other = byte_tokenizer(template=None)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    pair = ImplicitPRM(llama(1), llama(2), tokenizer=other)
    policy = HFPolicy(llama(3), byte_tokenizer())
    pair.bind(policy)
    tree = SearchTree(Prompt(messages=messages))
    tree.prompt = tree.prompt.with_ids(policy.encode(tree.prompt))
    node = tree.add(tree.root, [20, 21])
    pair.score_nodes([node])
    assert "prm" not in node.reward_ids
