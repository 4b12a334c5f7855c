import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import homer_triton as ht
from homer_triton.demo import CHECKPOINT
from homer_triton.demo.corpus import DOCUMENT_LENGTHS, Corpus
from homer_triton.demo.tokenizer import build_tokenizer
from homer_triton.demo.train import CONTEXT_LIMIT, main
from homer_triton.evaluation.passkey import find_answer, make_sample
from homer_triton.evaluation.samples import Sample

SAMPLES = 12
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def plain_model():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def homer_model():
    return ht.load(CHECKPOINT, dtype="float32", ops="torch")


def passkey_samples(tokenizer, times: int, samples: int) -> list[Sample]:
    """Texts that fill `times` context limits together with the answer."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    length = times * CONTEXT_LIMIT - NEW_TOKENS
    return [make_sample(length, (i + 0.5) / samples, 1000 + i, count) for i in range(samples)]


def plain_accuracy(model, tokenizer, times: int, samples: int = SAMPLES) -> float:
    right = 0
    for sample in passkey_samples(tokenizer, times, samples):
        text = f"{sample.context} {sample.prompt}"
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        right += find_answer(tokenizer.decode(out[0, ids.shape[1] :])) == sample.answer
    return right / samples


def homer_accuracy(model, tokenizer, times: int) -> float:
    config = ht.HomerConfig.paper(layers_warmup=1, recompute="suffix")
    right = 0
    for sample in passkey_samples(tokenizer, times, SAMPLES):
        encoded = ht.encode(model, sample.context, suffix=sample.prompt, config=config)
        text = ht.generate(model, encoded, max_new_tokens=NEW_TOKENS).text
        right += find_answer(text) == sample.answer
    return right / SAMPLES


def test_the_checkpoint_is_small_enough_to_ship():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 8e6


@pytest.mark.slow
def test_the_plain_model_knows_the_key_within_its_limit_only(plain_model, tokenizer):
    assert plain_model.config.max_position_embeddings == CONTEXT_LIMIT
    assert plain_accuracy(plain_model, tokenizer, times=1) >= 0.95
    assert plain_accuracy(plain_model, tokenizer, times=8, samples=3) == 0


@pytest.mark.slow
def test_homer_knows_the_key_at_eight_times_the_limit(homer_model, tokenizer):
    assert homer_accuracy(homer_model, tokenizer, times=8) >= 0.70


def test_text_comes_back_readable(tokenizer):
    text = "What is the pass key? The pass key is 71432. Remember it, never guess!"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.slow
@given(text=st.text(max_size=200))
def test_any_text_can_be_read(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert all(0 <= token < len(tokenizer) for token in ids)
    assert tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("length", DOCUMENT_LENGTHS)
def test_documents_hold_their_key_and_end_in_it(length):
    tokenizer = build_tokenizer(CONTEXT_LIMIT)
    corpus = Corpus(tokenizer, seed=0)
    for document in corpus.documents(200, length):
        assert len(document) == length
        assert document[-1] == tokenizer.eos_token_id
        answer = tokenizer.decode(document[-corpus.answer_rows : -1])
        key = find_answer(answer)
        assert answer == f"{key}."
        context = tokenizer.decode(document[1 : -corpus.answer_rows - corpus.question_rows])
        assert key in context


@pytest.mark.slow
def test_the_same_seed_trains_the_same_checkpoint(tmp_path, monkeypatch):
    weights = []
    monkeypatch.setattr("homer_triton.demo.train.TOKENS_PER_STEP", 512)
    for folder in (tmp_path / "first", tmp_path / "second"):
        monkeypatch.setattr("sys.argv", ["train", "--steps", "2", "--output", str(folder)])
        main()
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).get_vocab()
        weights.append(model.state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
