"""The defaults on a real pretrained model, where `make real` has made it; nothing is downloaded."""

from pathlib import Path

import pytest

import homer_triton as ht
from homer_triton.evaluation.passkey import find_answer, make_sample

CHECKPOINT = Path(__file__).parents[1] / "out" / "smollm2"


@pytest.mark.skipif(
    not (CHECKPOINT / "config.json").is_file(),
    reason="needs the checkpoint that `python bench/smollm2.py out/smollm2` makes",
)
def test_a_key_far_past_the_limit_is_found_with_all_settings_left_out() -> None:
    model = ht.load(CHECKPOINT, device="cpu", dtype="float32", ops="torch")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    limit = model.config.max_position_embeddings
    sample = make_sample(3 * limit // 2, 0.3, 5, lambda text: len(tokenizer.tokenize(text)))
    encoded = ht.encode(model, sample.context, suffix=sample.prompt)
    assert len(encoded) < limit // 8
    assert find_answer(ht.generate(model, encoded, max_new_tokens=8).text) == sample.answer
