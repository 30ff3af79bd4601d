"""Streamers get an answer step by step."""

from __future__ import annotations

from threading import Thread

import hf_models as hf
import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer

import prm_search as ps

tokenizer, pair_of, model, pair, guided, inputs = hf.FIXTURES
ONE = ps.BestOfN(1)


class Recorder:
    def __init__(self, fail_at=None):
        self.puts, self.ends, self.fail_at = [], 0, fail_at

    def put(self, value):
        if len(self.puts) == self.fail_at:
            raise RuntimeError("the reader went away")
        self.puts.append(value)

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("strategy", [ps.Beam(1, 3), ps.Beam(3, 2), ps.BestOfN(3), ps.Lookahead(2, 2)])
def test_streams_the_answer_step_by_step(strategy, model, tokenizer, guided):
    ids = tokenizer("2+2=", return_tensors="pt")
    recorder = Recorder()
    out = model.generate(
        **ids, max_new_tokens=14, streamer=recorder, return_dict_in_generate=True, prm_guidance=guided(strategy, seed=1)
    )
    assert recorder.ends == 1
    assert torch.equal(recorder.puts[0], ids["input_ids"])
    steps = [node.token_ids for node in out.prm[0].node.path()]
    assert [tuple(put[0].tolist()) for put in recorder.puts[1:]] == steps
    assert all(put.shape == (1, len(step)) for put, step in zip(recorder.puts[1:], steps, strict=True))


def test_streams_while_it_searches(model, pair, tokenizer, guided):
    """A single beam's steps are out before the next ones are drawn."""
    nodes_then = []

    class Watching(Recorder):
        def put(self, value):
            super().put(value)
            nodes_then.append(sum(len(tree.nodes) for tree in pair.prm._memos))

    ids = tokenizer("2+2=", return_tensors="pt")
    model.generate(**ids, max_new_tokens=16, streamer=Watching(), prm_guidance=guided(ps.Beam(1, 2), seed=1))
    assert len(nodes_then) >= 4
    assert nodes_then[1] < nodes_then[-2]


def test_text_streamers(model, tokenizer, guided, capsys):
    ids = tokenizer("2+2=", return_tensors="pt")
    given = {"max_new_tokens": 14, "prm_guidance": guided(ps.Beam(2, 2), seed=1)}
    wanted = tokenizer.decode(model.generate(**ids, **given)[0, 4:], skip_special_tokens=True)
    model.generate(**ids, **given, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == wanted + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = Thread(target=model.generate, kwargs={**ids, **given, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == wanted
    thread.join()


def test_a_stream_ends_even_when_the_search_fails(model, tokenizer, guided):
    recorder = Recorder(fail_at=2)
    ids = tokenizer("2+2=", return_tensors="pt")
    with pytest.raises(RuntimeError, match="went away"):
        model.generate(**ids, max_new_tokens=14, streamer=recorder, prm_guidance=guided(ps.Beam(1, 2), seed=1))
    assert recorder.ends == 1
    assert ps.HFPolicy(model, tokenizer).lm.tree.used == 0


def test_streams_have_one_row(model, inputs, tokenizer, guided):
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**inputs, max_new_tokens=4, streamer=Recorder(), prm_guidance=guided())
    one = tokenizer("2+2=", return_tensors="pt")
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**one, max_new_tokens=4, num_return_sequences=2, streamer=Recorder(), prm_guidance=guided())
