"""Encoded contexts: what is saved comes back, what goes on from one goes on right."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from cases import LAYERS, peers, random_tokens, to_config
from checkpoints import random_model
from oracle_tree import Settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import homer_triton as ht
from homer_triton.storage.tensor_file import checksum_of

TENSORS = ("keys", "values", "positions", "source_indices", "token_ids", "pruned_at", "logits")


@pytest.fixture(scope="module")
def encoded() -> ht.EncodedContext:
    """Six leaves, one of them short, of a float64 model."""
    tokens = random_tokens(75)
    settings = to_config(Settings(max_chunk_len=18, target_len=16, layers_warmup=2))
    return ht.encode(peers(4, 2)[1], tokens[2:72], tokens[:2], tokens[72:], settings)


def test_what_is_saved_comes_back(encoded: ht.EncodedContext, tmp_path: Path) -> None:
    encoded.save(tmp_path / "kept.safetensors")
    loaded = ht.EncodedContext.load(tmp_path / "kept.safetensors")
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(encoded, name)), name
        assert getattr(loaded, name).dtype == getattr(encoded, name).dtype, name
    for name in ("next_position", "plan", "stats", "model"):
        assert getattr(loaded, name) == getattr(encoded, name), name
    model, prompt = peers(4, 2)[1], random_tokens(4)
    again = ht.generate(model, loaded, prompt, 6)
    assert again.token_ids == ht.generate(model, encoded, prompt, 6).token_ids
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_a_path_that_cannot_be_written_is_refused(
    encoded: ht.EncodedContext, tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "missing" / "kept.safetensors"):
        with pytest.raises(ValueError, match="Cannot write"):
            encoded.save(path)
    assert not any(tmp_path.iterdir())


def test_it_is_named_in_a_line_and_moves(encoded: ht.EncodedContext) -> None:
    assert repr(encoded) == (
        f"EncodedContext(75 tokens in {len(encoded)} rows; {LAYERS} layers, 2 heads of 8, "
        "torch.float64, cpu)"
    )
    moved = encoded.to("meta")
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert (moved.plan, moved.model) == (encoded.plan, encoded.model)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no encoded context"):
        ht.EncodedContext.load(tmp_path / "kept.safetensors")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "no metadata", "no checksum"])
def test_a_damaged_file_is_refused(encoded: ht.EncodedContext, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "kept.safetensors"
    encoded.save(path)
    content = path.read_bytes()
    if damage in ("truncated", "empty", "text"):
        path.write_bytes({"truncated": content[:-8], "empty": b"", "text": b"once upon"}[damage])
    else:
        tensors, metadata = read_parts(path)
        del metadata[CHECKSUM]
        save_file(tensors, path, metadata if damage == "no checksum" else None)
    with pytest.raises(ValueError, match=r"is not an encoded context, or is damaged: .*encode the"):
        ht.EncodedContext.load(path)


def test_any_changed_bit_is_noticed(encoded: ht.EncodedContext, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    encoded.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    places = [*(draw.randrange(header, len(whole)) for _ in range(100))]
    places += [whole.index(name) + len(name) + 4 for name in (b"seconds", b"model")]
    for place in places:
        bit = 1 << draw.randrange(3)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is not an encoded context, or is damaged"):
            ht.EncodedContext.load(path)


CHECKSUM, KIND = "homer_triton.checksum", "homer_triton.encoded"


def read_parts(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a saved encoding."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in TENSORS}, dict(file.metadata())


def save_forged(
    path: Path, described: object, tensors: dict[str, Tensor], text: str | None = None
) -> None:
    """Save these under a checksum that is right, as someone who means harm would."""
    text = json.dumps(described) if text is None else text
    metadata = {KIND: text, CHECKSUM: checksum_of(text, tensors)}
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata)


def put(name: str, place: int, value: float) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    """Sets one number of a tensor."""

    def edit(described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[place] = value

    return edit


def turn(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """Replaces a tensor."""

    def edit(described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return edit


def say(*names: str, value: object) -> Callable[..., None]:
    """Replaces an entry of the description."""

    def edit(described: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        place = described
        for name in names[:-1]:
            place = place[name]
        place[names[-1]] = value

    return edit


NUMBERS = ("prefix_len", "context_len", "suffix_len", "max_chunk_len", "num_layers", "leaf_batch")


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (put("keys", 5, math.nan), "keys holds NaN"),
        (put("values", -1, math.inf), "values holds NaN or inf"),
        (put("logits", 0, math.nan), "logits holds NaN"),
        (put("positions", 3, -1), "positions holds -1"),
        (put("positions", 3, 90), "positions holds 90"),
        (put("token_ids", 3, -7), "token_ids holds -7"),
        (put("token_ids", 3, 96), "token_ids holds 96"),
        (put("source_indices", 3, 75), "source_indices holds 75"),
        (put("source_indices", 3, 2), "source_indices are not"),
        (put("pruned_at", 3, 100), "pruned_at holds"),
        (put("pruned_at", 3, -2), "pruned_at holds -2"),
        (turn("keys", lambda x: x.long()), "keys is of type I64"),
        (turn("keys", lambda x: x.half()), "values is of type F64 instead of F16"),
        (turn("keys", lambda x: x[:, :1]), "values has the shape"),
        (turn("keys", lambda x: x[..., :0]), "keys has the shape"),
        (turn("keys", lambda x: x[:, :, 1:]), "keys has the shape"),
        (turn("keys", lambda x: x[1:]), "keys has the shape"),
        (turn("keys", lambda x: x[0]), "keys has the shape"),
        (turn("positions", lambda x: x[1:]), "positions has the shape"),
        (turn("positions", lambda x: x.int()), "positions is of type I32"),
        (turn("pruned_at", lambda x: x.long()), "pruned_at is of type I64"),
        (turn("logits", lambda x: x.double()), "logits is of type F64"),
        (turn("logits", lambda x: x[:0]), "logits has the shape"),
        (lambda described, tensors: tensors.pop("values"), "it holds"),
        (lambda described, tensors: tensors.update(more=torch.ones(1)), "it holds"),
        *((say("next_position", value=x), "next_position is") for x in (-1, "x", 1.5, True, None)),
        (say("next_position", value=10**9), "next_position is"),
        (say("next_position", value=1), "positions holds"),
        (say("model", value=3), "model is 3"),
        (say("keys", value=3), "its description must have"),
        (say("plan", value=None), "a plan must have"),
        (say("plan", value=[1]), "a plan must have"),
        (say("plan", "more", value=1), "a plan must have"),
        *((say("plan", name, value=x), name) for name in NUMBERS for x in (-1, "3", 2.0, True)),
        (say("plan", "context_len", value=10**12), "token_ids has the shape"),
        (say("plan", "num_layers", value=10**9), "keys has the shape"),
        (say("plan", "target_len", value=10**30), "target_len"),
        (say("plan", "offload", value="yes"), "offload"),
        (say("plan", "recompute", value=[]), "recompute"),
        (say("plan", "asking", value=9), "asking"),
        (say("stats", value=None), "stats must be"),
        (say("stats", "tokens", value="many"), "stats are not"),
        (say("stats", "seconds", value=math.nan), "stats hold nan"),
        (say("stats", "seconds_by_height", value=3), "stats are not"),
        (say("stats", "seconds_by_height", value=["x"]), "stats hold 'x'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    encoded: ht.EncodedContext,
    tmp_path: Path,
    edit: Callable[[dict[str, Any], dict[str, Tensor]], object],
    reason: str,
) -> None:
    path = tmp_path / "kept.safetensors"
    encoded.save(path)
    tensors, metadata = read_parts(path)
    described = json.loads(metadata[KIND])
    save_forged(path, described, tensors)
    assert ht.EncodedContext.load(path).plan == encoded.plan
    edit(described, tensors)
    save_forged(path, described, tensors)
    with pytest.raises(ValueError, match=f"or is damaged: .*{reason}"):
        ht.EncodedContext.load(path)


@pytest.mark.parametrize("text", ["null", "7", "[]", '"x"', "{", "[" * 200_000, " " * 2**21 + "{}"])
def test_descriptions_of_another_kind_are_refused(
    encoded: ht.EncodedContext, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "kept.safetensors"
    encoded.save(path)
    save_forged(path, None, read_parts(path)[0], text)
    with pytest.raises(ValueError, match="is not an encoded context, or is damaged"):
        ht.EncodedContext.load(path)


@pytest.mark.slow
def test_a_small_file_with_large_claims_is_refused_at_once(
    encoded: ht.EncodedContext, tmp_path: Path
) -> None:
    path = tmp_path / "kept.safetensors"
    encoded.save(path)
    tensors, metadata = read_parts(path)
    described = json.loads(metadata[KIND])
    # As many nodes as a megabyte of tokens allows.
    described["plan"] |= {"max_chunk_len": 6, "target_len": 6, "num_layers": 40, "layers_tree": 40}
    described["plan"] |= {"layers_warmup": 0}
    many = {name: torch.zeros(110_005, dtype=tensors[name].dtype) for name in TENSORS[4:6]}
    many["keys"] = torch.zeros(40, 1, 1, 1)
    for claimed, reason in ((10**9, "token_ids has the shape"), (110_000, "keys has the shape")):
        described["plan"]["context_len"] = claimed
        save_forged(path, described, {**tensors, **many})
        assert path.stat().st_size < 2**20
        start = process_time()
        with pytest.raises(ValueError, match=f"or is damaged: {reason}"):
            ht.EncodedContext.load(path)
        # A second, and more for a slow and busy machine.
        assert process_time() - start < 8


def test_keys_of_other_heads_than_the_models_are_refused(encoded: ht.EncodedContext) -> None:
    fewer = replace(encoded, keys=encoded.keys[:, :1], values=encoded.values[:, :1])
    with pytest.raises(ValueError, match="keys have the shape"):
        ht.generate(peers(4, 2)[1], fewer)


@pytest.mark.parametrize("recompute", ["none", "suffix", "all"])
def test_transformers_goes_on_as_we_do(recompute: str) -> None:
    hf_model, model, _ = peers(4, 2)
    tokens, new = random_tokens(90), random_tokens(5, seed=1)
    tree = 6 if recompute == "all" else None
    settings = to_config(Settings(18, 16, 2, recompute=recompute, layers_tree=tree))
    encoded = ht.encode(model, tokens[2:87], tokens[:2], tokens[87:], settings)
    with torch.no_grad():
        theirs = hf_model(**encoded.to_transformers(new)).logits[0]
        ours = model.forward(
            torch.tensor(new),
            encoded.open_cache(model, room=len(new)),
            filled=len(encoded),
            position=encoded.next_position,
            all_logits=True,
        )
    # transformers computes its norms in float32 even in a float64 model.
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-4)


def test_transformers_generates_what_we_generate(encoded: ht.EncodedContext) -> None:
    hf_model, model, _ = peers(4, 2)
    prompt = random_tokens(3, seed=2)
    ours = ht.generate(model, encoded, prompt, max_new_tokens=12)
    theirs = hf_model.generate(
        **encoded.to_transformers(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert ours.token_ids == theirs[0, len(prompt) :].tolist()


def test_transformers_goes_on_from_a_batch(encoded: ht.EncodedContext) -> None:
    hf_model = peers(4, 2)[0]
    prompts = [random_tokens(3, seed) for seed in range(3)]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = hf_model.generate(**encoded.to_transformers(prompts), **settings)
    alone = [hf_model.generate(**encoded.to_transformers(ids), **settings) for ids in prompts]
    assert len({tuple(ids) for ids in together.tolist()}) == 3
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("batch", [1, 2])
def test_transformers_searches_with_beams(encoded: ht.EncodedContext, batch: int) -> None:
    """The best of all continuations of two tokens, which so many beams cannot miss."""
    hf_model = peers(4, 2)[0]
    prompts = torch.tensor([random_tokens(3, seed) for seed in range(batch)])
    beams = hf_model.config.vocab_size
    settings = {"max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    found = hf_model.generate(
        **encoded.to_transformers(prompts, copies=beams), num_beams=beams, **settings
    )
    for prompt, ids in zip(prompts, found.tolist(), strict=True):
        first = torch.cat([prompt.expand(beams, -1), torch.arange(beams)[:, None]], 1)
        with torch.no_grad():
            logits = hf_model(**encoded.to_transformers(first)).logits[:, -2:]
        one, two = logits.log_softmax(-1).unbind(1)
        best = int((one[0, :, None] + two).argmax())
        assert ids == [*prompt.tolist(), *divmod(best, beams)]
    assert len(found) == batch


def test_transformers_samples_several_answers(encoded: ht.EncodedContext) -> None:
    inputs = encoded.to_transformers([5, 6], copies=4)
    answers = peers(4, 2)[0].generate(
        **inputs, num_return_sequences=4, do_sample=True, max_new_tokens=5, pad_token_id=0
    )
    assert answers.shape[0] == 4
    assert answers[:, :2].tolist() == [[5, 6]] * 4


@pytest.mark.parametrize("wrong", [[[5], [6, 7]], [[[5]]], [1.5], ["a"], 7, [True], [[]]])
def test_new_ids_of_another_kind_are_refused(encoded: ht.EncodedContext, wrong: object) -> None:
    with pytest.raises(ValueError, match="new_ids"):
        encoded.to_transformers(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="copies=0"):
        encoded.to_transformers([5], copies=0)


def test_one_encoding_answers_many_prompts_and_stays_as_it_is(encoded: ht.EncodedContext) -> None:
    hf_model, model, _ = peers(4, 2)
    before = {name: getattr(encoded, name).clone() for name in TENSORS}
    prompts = [random_tokens(4, seed) for seed in range(3)]
    alone = [ht.generate(model, encoded, prompt, 5).token_ids for prompt in prompts]
    assert len({tuple(ids) for ids in alone}) > 1
    assert [ht.generate(model, encoded, prompt, 5).token_ids for prompt in prompts] == alone
    with torch.no_grad():
        hf_model(**encoded.to_transformers(prompts[0]))
    for name, tensor in before.items():
        assert torch.equal(getattr(encoded, name), tensor), name


def test_encode_changes_neither_its_inputs_nor_the_model() -> None:
    hf_model, model, _ = peers(4, 1)
    parts = [torch.tensor(random_tokens(count)) for count in (60, 2, 3)]
    given = [part.clone() for part in parts]
    weights = {name: weight.clone() for name, weight in hf_model.state_dict().items()}
    ht.encode(model, *parts, to_config(Settings(16, 16, 2)))
    assert all(torch.equal(a, b) for a, b in zip(parts, given, strict=True))
    for name, weight in hf_model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_another_models_encoding_is_refused(encoded: ht.EncodedContext) -> None:
    other = ht.from_transformers(random_model(num_hidden_layers=LAYERS, seed=5), ops="torch")
    with pytest.raises(ValueError, match="another model"):
        ht.generate(other, encoded)


@pytest.mark.parametrize("none", [[], torch.empty(1, 0, dtype=torch.int64)])
def test_going_on_without_a_token_is_refused(
    encoded: ht.EncodedContext, none: Tensor | list[int]
) -> None:
    with pytest.raises(ValueError, match="new_ids is empty"):
        encoded.to_transformers(none)
