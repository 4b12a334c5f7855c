"""The calibration bias against the oracle's, its files, and what it refuses to serve."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYERS, peers, random_bias, random_tokens, to_config
from checkpoints import random_model
from oracle_tree import Settings
from safetensors.torch import save_file

import homer_triton as ht

SETTINGS = Settings(max_chunk_len=18, target_len=16, layers_warmup=2)


def calibrated(**settings: Any) -> ht.Calibration:
    return ht.calibrate(peers(4, 2)[1], [random_tokens(100)], **settings)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_bias_is_the_oracles(heads: tuple[int, int]) -> None:
    _, model, oracle = peers(*heads)
    texts = [random_tokens(30, seed) for seed in range(3)]
    calibration = ht.calibrate(model, texts, segment_len=18, num_segments=4)
    joined = [*chain.from_iterable(texts)]
    segments = [joined[start : start + 18] for start in (0, 24, 48, 72)]
    expected = oracle.calibrate(segments).float()
    torch.testing.assert_close(calibration.bias, expected, atol=1e-5, rtol=1e-5)
    assert calibration.model == model.fingerprint


def test_few_tokens_make_fewer_segments() -> None:
    model, oracle = peers(4, 2)[1:]
    tokens = random_tokens(20)
    calibration = ht.calibrate(model, [tokens], segment_len=18, num_segments=100)
    expected = oracle.calibrate([tokens[start : start + 18] for start in range(3)])
    torch.testing.assert_close(calibration.bias, expected.float(), atol=1e-5, rtol=1e-5)


def test_segments_are_as_long_as_chunks_when_left_out() -> None:
    config = peers(4, 2)[1].config
    assert calibrated().bias.shape == (LAYERS, ht.HomerConfig().chunk_len(config))


def test_a_file_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        calibrated().save(tmp_path / "bias.pt")
    assert not list(tmp_path.iterdir())


def test_encode_subtracts_it() -> None:
    model, tokens = peers(4, 2)[1], random_tokens(70)
    stamped = calibrated(segment_len=18)
    kept = []
    for calibration in (stamped, ht.Calibration(stamped.bias), None):
        config = ht.HomerConfig(18, 16, 2, calibration, selection="paper")
        kept.append(ht.encode(model, tokens, [1], [2], config).source_indices.tolist())
    assert kept[0] == kept[1] != kept[2]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    calibration = calibrated(segment_len=18)
    calibration.save(tmp_path / "bias.safetensors")
    loaded = ht.Calibration.load(tmp_path / "bias.safetensors")
    assert torch.equal(loaded.bias, calibration.bias)
    assert loaded.model == calibration.model


@pytest.mark.parametrize("wrap", [lambda bias: bias, lambda bias: {"bias": bias}])
def test_torch_files_of_one_tensor_are_read(tmp_path: Path, wrap: Callable) -> None:
    bias = random_bias(20).half()
    torch.save(wrap(bias), tmp_path / "bias.pt")
    loaded = ht.Calibration.load(tmp_path / "bias.pt")
    assert torch.equal(loaded.bias, bias.float())
    assert loaded.model is None


def test_one_without_a_checksum_is_refused(tmp_path: Path) -> None:
    stamp = {"homer_triton.calibration": json.dumps({"model": None, "score": "log_softmax"})}
    save_file({"bias": random_bias(20)}, tmp_path / "bias.safetensors", metadata=stamp)
    with pytest.raises(ValueError, match="an earlier version must have written it"):
        ht.Calibration.load(tmp_path / "bias.safetensors")


def test_any_changed_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "bias.safetensors"
    calibrated(segment_len=18).save(path)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, start + 9, len(whole) - 1, whole.index(b"model") + 12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"or is damaged: .* has changed.*; calibrate again"):
            ht.Calibration.load(path)


@pytest.mark.parametrize("stamp", ["null", "7", "[]", "{", "[" * 100_000, '{"model": 7}'])
def test_stamps_of_another_kind_are_refused(tmp_path: Path, stamp: str) -> None:
    path = tmp_path / "bias.safetensors"
    metadata = {"homer_triton.calibration": stamp, "homer_triton.checksum": "0" * 32}
    save_file({"bias": random_bias(20)}, path, metadata)
    with pytest.raises(ValueError, match="is not a calibration file, or is damaged"):
        ht.Calibration.load(path)


class Malicious:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("two.pt", {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, "exactly one tensor"),
        ("list.pt", [1.0, 2.0], "exactly one tensor"),
        ("code.pt", Malicious(), "neither a safetensors nor a torch file"),
        ("flat.pt", torch.ones(4), "layers, distances"),
        ("whole.pt", torch.ones(4, 4) / 0, "NaN or infinite"),
        # A few bytes that would take terabytes.
        ("wide.pt", torch.ones(1, 1).expand(10**6, 10**6), "with all of its numbers"),
        ("sparse.pt", torch.ones(2, 2).to_sparse(), "with all of its numbers"),
    ],
)
def test_other_torch_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        ht.Calibration.load(tmp_path / name)
    assert not Path("unpickled").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no calibration file"):
        ht.Calibration.load(tmp_path / "missing.safetensors")
    for name, content in (("bias.safetensors", b"no"), ("bias.pt", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="bias"):
            ht.Calibration.load(tmp_path / name)
    save_file({"other": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a calibration file"):
        ht.Calibration.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int64), "int64"),
        (torch.ones(0, 4), "layers, distances"),
        (torch.ones(2, 3, 4), "layers, distances"),
        (torch.full((2, 3), float("nan")), "NaN"),
    ],
)
def test_tensors_of_another_kind_are_refused(bias: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ht.Calibration(bias)


def encode_with(calibration: ht.Calibration, model: ht.Llama) -> None:
    config = ht.HomerConfig.paper(
        max_chunk_len=18, target_len=16, layers_warmup=2, calibration=calibration
    )
    ht.encode(model, random_tokens(70), [1], [2], config)


def test_a_calibration_for_something_else_is_refused() -> None:
    model = peers(4, 2)[1]
    stamped = calibrated(segment_len=18)
    other = ht.from_transformers(random_model(num_hidden_layers=LAYERS, seed=9), ops="torch")
    with pytest.raises(ValueError, match="made for another model"):
        encode_with(stamped, other)
    with pytest.raises(ValueError, match=f"has 3 layers, the model {LAYERS}"):
        encode_with(ht.Calibration(random_bias(20, layers=3)), model)


def test_a_calibration_must_reach_across_a_chunk() -> None:
    """A chunk's context and suffix span leaf_context + 1 tokens here, so as many distances."""
    model, tokens = peers(4, 2)[1], random_tokens(70)
    needed = ht.encode(model, tokens, [1], [2], to_config(SETTINGS)).plan.leaf_context + 1
    encode_with(ht.Calibration(random_bias(needed)), model)
    with pytest.raises(ValueError, match=f"segments of at least {needed} tokens"):
        encode_with(ht.Calibration(random_bias(needed - 1)), model)
    # What is read again is chosen from a chunk that is as long as the root's.
    again = ht.HomerConfig(18, 16, 2, ht.Calibration(random_bias(needed)))
    with pytest.raises(ValueError, match="segments of at least 17 tokens"):
        ht.encode(model, tokens, [1], [2], again)


def test_a_calibration_must_reach_across_a_text_of_one_chunk() -> None:
    model, tokens = peers(4, 2)[1], random_tokens(15)
    config = ht.HomerConfig.paper(max_chunk_len=18, layers_warmup=2)
    for target_len, needed in ((10, 16), (17, 0)):
        short = replace(config, target_len=target_len, calibration=ht.Calibration(random_bias(12)))
        plan = ht.plan(model, 15, 1, 1, short)
        assert plan.height == 0
        if needed:
            with pytest.raises(ValueError, match=f"segments of at least {needed} tokens"):
                short.calibration.check(model, plan)
        else:  # nothing is pruned, so nothing is corrected
            assert len(ht.encode(model, tokens, [1], [2], short)) == 17


def test_a_text_in_place_of_texts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"texts is a list of texts, not a text; give \[text\]"):
        ht.calibrate(peers(4, 2)[1], "The sky is blue.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_len": 1}, "segment_len=1 must be"),
        ({"segment_len": 65}, "segment_len=65 must be"),
        ({"num_segments": 0}, "num_segments=0"),
        ({"segment_len": 60}, "have 50 tokens, a segment needs 60"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ht.calibrate(peers(4, 2)[1], [random_tokens(50)], **settings)
    with pytest.raises(ValueError, match="0 tokens"):
        ht.calibrate(peers(4, 2)[1], [])


@pytest.mark.parametrize("stamp", ["null", "3", "[]", '"x"', '{"model": 3}', "[" * 200_000])
def test_a_stamp_of_another_kind_is_refused(tmp_path: Path, stamp: str) -> None:
    file = tmp_path / "bias.safetensors"
    save_file({"bias": torch.ones(2, 3)}, file, metadata={"homer_triton.calibration": stamp})
    with pytest.raises(ValueError, match=r"bias\.safetensors is"):
        ht.Calibration.load(file)
