import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import homer_triton as ht
from homer_triton.demo import CHECKPOINT, TEXT_CHECKPOINT
from homer_triton.demo.text_corpus import (
    HELD_OUT,
    WindowSampler,
    build_tokenizer,
    held_out_modules,
    tokenize_corpus,
    training_texts,
)
from homer_triton.demo.train_text import CONTEXT_LIMIT, train
from homer_triton.demo.training import save
from homer_triton.evaluation.methods import make_readers
from homer_triton.evaluation.perplexity import PerplexityTask, lay_out_documents, run_perplexity
from homer_triton.evaluation.runs import RunFolder

STREAM = torch.arange(10_000, 20_000)
BEGIN = 1
LENGTH, ROOM = 64, 20


@pytest.fixture(scope="module")
def model():
    return ht.load(TEXT_CHECKPOINT, dtype="float32", ops="torch")


@pytest.fixture(scope="module")
def calibration():
    return ht.Calibration.load(TEXT_CHECKPOINT / "calibration.safetensors")


@pytest.fixture(scope="module")
def perplexity(model, tmp_path_factory):
    """By method: held-out modules from 8 × the context limit on, two segments of each."""
    texts = {name: held_out_modules()[name] for name in ("inspect.py", "tarfile.py", "typing.py")}
    laid_out = lay_out_documents(model, texts, 10 * CONTEXT_LIMIT, None)
    starts = dict.fromkeys(texts, (8 * CONTEXT_LIMIT, 9 * CONTEXT_LIMIT))
    task = PerplexityTask(laid_out.documents, CONTEXT_LIMIT, starts, laid_out.suffix)
    config = ht.HomerConfig.paper(recompute="suffix")
    readers = make_readers(("plain", "window", "homer"), model, config)
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "perplexity", {}, {})
    metrics = run_perplexity(model, readers, task, folder, 0, lambda: None)
    return {row["method"]: row["perplexity"] for row in metrics["overall"]}


def test_both_checkpoints_are_small_enough_to_ship():
    sizes = {
        folder: sum(file.stat().st_size for file in folder.iterdir())
        for folder in (CHECKPOINT, TEXT_CHECKPOINT)
    }
    assert sizes[TEXT_CHECKPOINT] <= 16e6
    assert sum(sizes.values()) <= 24e6


@pytest.mark.slow
def test_homer_reads_on_where_the_plain_model_is_lost(perplexity):
    assert perplexity["homer"] <= 1.15 * perplexity["window"]
    assert perplexity["plain"] >= 2 * perplexity["window"]


def test_the_calibration_serves_the_model(model, calibration):
    config = ht.HomerConfig(calibration=calibration)
    encoded = ht.encode(model, held_out_modules()["typing.py"][: 8 * CONTEXT_LIMIT], config=config)
    assert encoded.plan.height >= 2
    assert encoded.logits.isfinite().all()


@given(text=st.text(max_size=200))
def test_any_text_comes_back_as_it_was(model, text):
    ids = model.tokenizer(text).input_ids
    assert ids[0] == model.tokenizer.bos_token_id
    assert model.tokenizer.decode(ids[1:]) == text


@pytest.mark.slow
def test_held_out_modules_are_not_trained_on():
    held_out = held_out_modules()
    assert len(held_out) >= 6
    assert set(held_out) <= set(HELD_OUT)
    assert not set(held_out.values()) & set(training_texts())


@given(seed=st.integers(0, 2**32))
def test_a_dense_window_is_a_piece_of_the_text(seed):
    ids, positions, targets = WindowSampler(STREAM, BEGIN, LENGTH, ROOM, seed).windows(3, 0.0)
    assert (ids[:, 0] == BEGIN).all()
    assert torch.equal(targets[:, :-1], ids[:, 1:])
    assert (targets[:, 1:] == ids[:, 1:] + 1).all()
    assert torch.equal(positions, torch.arange(LENGTH).expand(3, -1))


@given(seed=st.integers(0, 2**32))
def test_a_sparse_window_keeps_what_a_merge_would(seed):
    ids, positions, targets = WindowSampler(STREAM, BEGIN, LENGTH, ROOM, seed).windows(3, 1.0)
    assert ids.shape == positions.shape == targets.shape == (3, LENGTH)
    assert (ids[:, 0] == BEGIN).all()
    assert (ids[:, 1:].diff() >= 1).all()
    assert (targets[:, 1:] == ids[:, 1:] + 1).all()
    assert (targets[:, 0] == ids[:, 1]).all()
    assert (positions[:, 0] == 0).all()
    assert (positions[:, 1:] >= 1).all()
    context, continuation = positions[:, 1 : ROOM + 1], positions[:, ROOM + 1 :]
    assert (context <= ROOM).all()
    assert (continuation.diff() == 1).all()
    assert (continuation[:, 0] > context.amax(1)).all()
    assert (continuation[:, -1] < LENGTH).all()


def test_texts_are_joined_by_the_end_token():
    tokenizer = build_tokenizer(["def one(): pass", "two"], 300, CONTEXT_LIMIT)
    stream = tokenize_corpus(tokenizer, ["one", "two"])
    assert tokenizer.decode(stream) == "one</s>two</s>"


@pytest.mark.slow
def test_the_same_seed_trains_the_same_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("homer_triton.demo.train_text.WINDOWS_PER_STEP", 1)
    texts = training_texts()[:10]
    checkpoints = []
    for name in ("first", "second"):
        save(*train(texts, steps=2, seed=0), tmp_path / name)
        checkpoints.append((tmp_path / name / "model.safetensors").read_bytes())
    assert checkpoints[0] == checkpoints[1]
