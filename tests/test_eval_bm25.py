"""Passages chosen by BM25, for the plain model to read."""

import sys
from pathlib import Path

import pytest
import torch
from eval_model import LIMIT, save_model

import homer_triton as ht
from homer_triton.evaluation.bm25 import PASSAGE_LEN, passage_lengths, rank, retrieve
from homer_triton.evaluation.methods import METHODS, make_readers
from homer_triton.text.tokens import tokenize

FILLER = "the grass is green and the water runs over the stone . "
NEEDLE = "The pass key is 71432 . "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ht.Llama:
    return ht.load(save_model(tmp_path_factory.mktemp("model")), ops="torch")


def ids(model: ht.Llama, text: str) -> torch.Tensor:
    return tokenize(model, text, "text")


def test_passages_end_with_a_sentence_where_one_ends_near(model: ht.Llama) -> None:
    sentence = ids(model, FILLER)
    assert len(sentence) == 12
    assert passage_lengths(model, sentence.repeat(5), 25) == [24, 24, 12]
    assert passage_lengths(model, sentence.repeat(5), 20) == [12] * 5
    # Nothing ends in the second half of the first 23 tokens, but right after the first half of 22.
    assert passage_lengths(model, sentence.repeat(2), 23) == [23, 1]
    assert passage_lengths(model, sentence.repeat(2), 22) == [12, 12]
    assert passage_lengths(model, sentence[:-1].repeat(9), 25) == [25, 25, 25, 24]


def test_words_decide_and_of_equal_passages_the_earlier_is_first() -> None:
    pytest.importorskip("bm25s", reason="retrieval needs bm25s")
    passages = [["a", "b"], ["c", "d"], [], ["a", "b"], ["c", "a"]]
    assert rank(passages, ["c", "nowhere"]) == [1, 4, 0, 2, 3]
    assert rank(passages, ["c", "a"]) == [4, 1, 0, 3, 2]
    assert rank(passages, ["nowhere"]) == [0, 1, 2, 3, 4]
    assert rank([[], []], []) == [0, 1]


def test_the_passage_with_the_answer_is_read_in_its_place(model: ht.Llama) -> None:
    pytest.importorskip("bm25s", reason="retrieval needs bm25s")
    context = ids(model, FILLER * 30 + NEEDLE + FILLER * 30)
    question = ids(model, "What is the pass key? The pass key is")
    kept = retrieve(model, context, question, 60)
    needle = ids(model, NEEDLE).tolist()
    runs = [kept[i : i + len(needle)].tolist() for i in range(len(kept))]
    assert needle in runs
    assert 60 - PASSAGE_LEN // 4 < len(kept) <= 60
    assert torch.equal(kept, retrieve(model, context, question, 60))
    assert torch.equal(retrieve(model, context, question, len(context)), context)


def test_the_plain_model_reads_prefix_passages_and_suffix(model: ht.Llama) -> None:
    pytest.importorskip("bm25s", reason="retrieval needs bm25s")
    prefix, context = torch.tensor([1]), ids(model, FILLER * 30 + NEEDLE + FILLER * 30)
    suffix = ids(model, "What is the pass key? The pass key is")
    config = ht.HomerConfig(target_len=50)
    reading = METHODS["retrieval"](model, config, prefix, context, suffix, 5)
    passages = retrieve(model, context, suffix, 50 - 1 - len(suffix))
    expected = torch.cat([prefix, passages, suffix])
    assert len(expected) <= 50 < LIMIT
    assert reading.encoded.token_ids.tolist() == expected.tolist()
    logits = model.forward(expected, model.new_cache(len(expected)))
    torch.testing.assert_close(reading.encoded.logits, logits, atol=1e-4, rtol=0)


def test_no_room_for_a_passage_is_refused(model: ht.Llama) -> None:
    with pytest.raises(ValueError, match="no room for a passage"):
        retrieve(model, ids(model, FILLER), ids(model, FILLER), 0)


def test_missing_bm25s_is_said_before_the_work(
    model: ht.Llama, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ValueError, match=r"pip install 'homer_triton\[eval\]'"):
        make_readers(("plain", "retrieval"), model, ht.HomerConfig())
    assert list(make_readers(("plain", "homer"), model, ht.HomerConfig())) == ["plain", "homer"]
