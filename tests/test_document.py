"""Documents: a text read once answers every question, from memory or from a file."""

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import under_other_defaults
from checkpoints import random_model
from command_line import checkpoint, text
from test_retrieval import copying_model

import homer_triton as ht
from homer_triton.engine import reading
from homer_triton.engine.reading import Chunks, choose_heads, quantize, read_chunk
from homer_triton.storage import document_file

pytestmark = pytest.mark.filterwarnings("ignore:The model has no retrieval heads")


@pytest.fixture(scope="module")
def finder() -> ht.Llama:
    """A model with a head that attends to the tokens that it stands on, and no tokenizer."""
    return ht.from_transformers(copying_model(), ops="torch")


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> ht.Llama:
    """A model whose tokenizer knows the words w3, w4, …"""
    folder = checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=256)
    return ht.load(folder, device="cpu", dtype="float32", ops="torch")


def tokens(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randperm(4000, generator=torch.Generator().manual_seed(seed))[:count]


def test_the_kept_keys_are_those_of_transformers() -> None:
    peer = random_model(num_key_value_heads=2, max_position_embeddings=256).eval()
    model = ht.from_transformers(peer, ops="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        heads = choose_heads(model)
    ids = torch.randint(90, (100,), generator=torch.Generator().manual_seed(0))
    opening, chunks = torch.tensor([1]), Chunks(40, 32)
    for start in range(0, 100, chunks.length):
        keys, scales = quantize(read_chunk(model, heads, ids, opening, chunks, start))
        overlap = min(chunks.overlap, start)
        chunk = torch.cat([opening, ids[start - overlap : start + chunks.length]])
        with torch.no_grad():
            cache = peer(chunk[None], use_cache=True).past_key_values
        for index, (layer, head) in enumerate(heads.key_heads):
            expected = cache.layers[layer].keys[0, head, 1 + overlap :]
            found = keys[:, index].float() * scales[:, index, None]
            assert (found - expected).abs().max() <= expected.abs().max() / 127


def test_the_best_retrieval_heads_are_kept(finder: ht.Llama) -> None:
    heads = choose_heads(finder)
    assert max(zip(heads.weights, heads.heads, strict=True))[1] == (0, 2)
    assert sum(heads.weights) == pytest.approx(1)
    assert heads.last_layer < finder.config.num_hidden_layers


def test_a_model_without_retrieval_heads_says_so() -> None:
    model = ht.from_transformers(random_model(), ops="torch")
    with pytest.warns(UserWarning, match="has no retrieval heads"):
        document = ht.read(model, list(range(3, 60)))
    assert len(document.encode([5, 6], config=ht.HomerConfig(target_len=64))) == 60


@pytest.mark.parametrize("place", [70, 300, 511, 900])
def test_a_question_finds_its_place(finder: ht.Llama, place: int) -> None:
    ids = tokens(1000)
    document = ht.read(finder, ids)
    best = document.find(ids[place : place + 6])[0]
    assert best.start <= place + 5
    assert best.end > place


def test_every_question_finds_its_own_place_and_the_text_is_not_read_again(
    finder: ht.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(1000)
    document = ht.read(finder, ids)
    monkeypatch.setattr("homer_triton.document.read_chunk", None)
    config = ht.HomerConfig(target_len=120)
    for place in (500, 40, 800):
        for prefix in ([1], [9, 8, 7, 6]):
            encoded = document.encode(ids[place : place + 6], prefix, config)
            kept = set(encoded.token_ids.tolist())
            assert {*ids[place : place + 6].tolist()} <= kept
            assert encoded.token_ids[: len(prefix)].tolist() == prefix
            assert len(encoded) <= 120
            assert encoded.sources[0].start <= place + 5


def test_what_fits_is_read_whole(worded: ht.Llama) -> None:
    words = text(100)
    document = ht.read(worded, words)
    question, config = "w5 w6", ht.HomerConfig(target_len=200)
    encoded = document.encode(question, config=config)
    whole = ht.HomerConfig(max_chunk_len=200, target_len=200)
    expected = ht.encode(worded, words, suffix=question, config=whole)
    assert torch.equal(encoded.token_ids, expected.token_ids)
    torch.testing.assert_close(encoded.logits, expected.logits)


def test_sources_are_places_of_the_text(worded: ht.Llama) -> None:
    texts = {"one": "w5 w6 w7.\nw8 w9 w10.\n" * 9, "two": "w11 w12.\nw13 w14.\n" * 9}
    document = ht.read(worded, texts)
    found = document.find("w13 w14")
    assert {source.name for source in found} == {"one", "two"}
    for source in found:
        assert texts[str(source.name)][source.start : source.end].strip()
    pieces = [
        texts[str(s.name)][s.start : s.end] for s in sorted(found, key=lambda s: (s.name, s.start))
    ]
    assert "".join("".join(pieces).split()) == "".join("".join(texts.values()).split())
    assert [source.votes for source in found] == sorted((s.votes for s in found), reverse=True)


def test_an_answer_tells_what_it_was_made_from(worded: ht.Llama) -> None:
    document = ht.read(worded, "w5 w6 w7.\nw8 w9 w10.\n" * 40)
    answer = document.ask("w8 w9", config=ht.HomerConfig(target_len=40), max_new_tokens=3)
    said = ht.generate(
        worded, document.encode("\nw8 w9", config=ht.HomerConfig(target_len=40)), max_new_tokens=3
    )
    assert answer.token_ids == said.token_ids
    assert answer.sources
    assert all(source.votes >= 0 for source in answer.sources)


@pytest.mark.parametrize("cut", [1, 64, 100, 127, 128, 199])
def test_appending_equals_reading_both(finder: ht.Llama, cut: int) -> None:
    ids, config = tokens(200), ht.HomerConfig(max_chunk_len=64)
    whole = ht.read(finder, ids, config)
    grown = ht.read(finder, ids[:cut], config).append(ids[cut:])
    assert torch.equal(grown.token_ids, whole.token_ids)
    for name in ("keys", "scales", "unit_starts", "unit_spans"):
        assert torch.equal(grown._file.tensors[name], whole._file.tensors[name]), name


def test_appending_reads_only_the_last_chunk_again(
    finder: ht.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = ht.read(finder, tokens(200), ht.HomerConfig(max_chunk_len=64))
    chunks: list[int] = []
    run = reading._keys_of

    def counted(model: ht.Llama, heads: Any, chunk: torch.Tensor, end: int) -> torch.Tensor:
        chunks.append(len(chunk))
        return run(model, heads, chunk, end)

    monkeypatch.setattr(reading, "_keys_of", counted)
    document.append(tokens(10, seed=2))
    assert len(chunks) == 1


def test_texts_are_appended_by_name(worded: ht.Llama) -> None:
    document = ht.read(worded, {"a": "w5 w6.\nw7 w8.\n"})
    document = document.append("w9 w10.\n", name="b").append("w11 w12.\n")
    assert [text.name for text in document.texts] == ["a", "b"]
    assert document.texts[1].content == "w9 w10.\nw11 w12.\n"
    whole = ht.read(worded, {"a": "w5 w6.\nw7 w8.\n", "b": "w9 w10.\nw11 w12.\n"})
    assert torch.equal(document._file.tensors["unit_spans"], whole._file.tensors["unit_spans"])
    assert torch.equal(document._file.tensors["keys"], whole._file.tensors["keys"])


def test_a_file_answers_as_the_document_in_memory(finder: ht.Llama, tmp_path: Path) -> None:
    ids, config = tokens(300), ht.HomerConfig(max_chunk_len=64)
    document = ht.read(finder, ids, config)
    document.save(tmp_path / "saved.homer")
    ht.read(finder, ids, config, path=tmp_path / "read.homer")
    assert sorted(os.listdir(tmp_path)) == ["read.homer", "saved.homer"]
    assert (tmp_path / "saved.homer").read_bytes() == (tmp_path / "read.homer").read_bytes()
    opened = ht.Document.load(tmp_path / "read.homer", finder)
    assert opened.find(ids[70:76]) == document.find(ids[70:76])
    assert len(opened.append([5, 6])) == 302


def test_an_interrupted_reading_goes_on(
    finder: ht.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, config = tokens(300), ht.HomerConfig(max_chunk_len=64)
    path, run, chunks = tmp_path / "x.homer", reading._keys_of, []

    def interrupted(model: ht.Llama, heads: Any, chunk: torch.Tensor, end: int) -> torch.Tensor:
        if len(chunks) == 3:
            raise KeyboardInterrupt
        chunks.append(chunk)
        return run(model, heads, chunk, end)

    monkeypatch.setattr(reading, "_keys_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ht.read(finder, ids, config, path=path)
    assert os.listdir(tmp_path) == ["x.homer.partial"]
    with pytest.raises(ValueError, match="only 3 of its 5 chunks were read"):
        ht.Document.load(tmp_path / "x.homer.partial", finder)
    chunks.clear()
    ht.read(finder, ids, config, path=path)
    assert len(chunks) == 2
    monkeypatch.undo()
    expected = ht.read(finder, ids, config)
    assert ht.Document.load(path, finder).find(ids[9:15]) == expected.find(ids[9:15])


def test_another_reading_does_not_go_on_from_this_one(finder: ht.Llama, tmp_path: Path) -> None:
    path = tmp_path / "x.homer"
    ht.read(finder, tokens(100), path=path)
    ht.read(finder, tokens(120, seed=3), path=path)
    assert len(ht.Document.load(path, finder)) == 120


def test_a_full_disk_is_told_before_the_text_is_read(
    finder: ht.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(document_file.os, "posix_fallocate", full)
    monkeypatch.setattr("homer_triton.document.read_chunk", None)
    with pytest.raises(ValueError, match=r"Cannot write .*: No space left on device\."):
        ht.read(finder, tokens(100), path=tmp_path / "x.homer")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("where", ["header", "ids", "keys", "end"])
def test_a_damaged_file_is_told(finder: ht.Llama, tmp_path: Path, where: str) -> None:
    path = tmp_path / "x.homer"
    ht.read(finder, tokens(300), path=path)
    content = bytearray(path.read_bytes())
    keys = len(content) - 1 - 300 * finder.config.head_dim
    if where == "end":
        del content[-5:]
    else:
        content[{"header": 20, "ids": keys - 20 * 300, "keys": keys}[where]] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"(is not a document, or )?is damaged: .*read the text again"
    ):
        ht.Document.load(path, finder).find([5, 6, 7])


def test_another_models_document_is_refused(finder: ht.Llama, tmp_path: Path) -> None:
    ht.read(finder, tokens(100), path=tmp_path / "x.homer")
    other = ht.from_transformers(random_model(), ops="torch")
    with pytest.raises(ValueError, match="was read by another model"):
        ht.Document.load(tmp_path / "x.homer", other)
    with pytest.raises(FileNotFoundError, match="There is no document"):
        ht.Document.load(tmp_path / "y.homer", other)


def test_bad_input_is_told(worded: ht.Llama) -> None:
    with pytest.raises(ValueError, match="The text is empty"):
        ht.read(worded, "")
    with pytest.raises(ValueError, match="The text 'b' is empty"):
        ht.read(worded, {"a": "w5", "b": ""})
    with pytest.raises(ValueError, match="There is no text"):
        ht.read(worded, {})
    document = ht.read(worded, text(100))
    with pytest.raises(ValueError, match="is no setting of generate"):
        document.ask("w5", max_tokens=3)
    assert len(ht.read(worded, "w5").encode("w6", keep="all")) == 3
    for ask in (lambda: document.ask(" "), lambda: document.encode("")):
        with pytest.raises(ValueError, match="The question is empty"):
            ask()
    with pytest.raises(ValueError, match="leave the text no room in target_len"):
        document.encode(text(9), config=ht.HomerConfig(target_len=5))
    with pytest.raises(ValueError, match="The text is empty"):
        document.append("")


def test_keys_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="The keys are not finite"):
        quantize(torch.full((2, 1, 4), torch.nan))


def test_small_keys_are_kept() -> None:
    small = torch.full((1, 1, 4), 1e-7)
    keys, scales = quantize(small)
    torch.testing.assert_close(keys * scales[..., None].float(), small, atol=4e-8, rtol=0)


def test_a_file_that_is_in_the_way_is_left_alone(finder: ht.Llama, tmp_path: Path) -> None:
    partial, notes = tmp_path / "x.homer.partial", tmp_path / "notes"
    notes.write_text("my own notes")
    partial.symlink_to(notes)
    with pytest.raises(ValueError, match="Cannot write"):
        ht.read(finder, tokens(100), path=tmp_path / "x.homer")
    partial.unlink()
    partial.write_text("my own notes")
    with pytest.raises(ValueError, match="is in the way and is no unfinished document"):
        ht.read(finder, tokens(100), path=tmp_path / "x.homer")
    assert partial.read_text() == notes.read_text() == "my own notes"


def test_two_processes_do_not_write_one_file(
    finder: ht.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "x.homer", reading._keys_of
    refused: list[str] = []

    def meanwhile(*arguments: Any) -> torch.Tensor:
        if not refused:
            refused.append("")
            with pytest.raises(ValueError, match="Another process is writing") as error:
                ht.read(finder, tokens(100), path=path)
            refused[0] = str(error.value)
        return run(*arguments)

    monkeypatch.setattr(reading, "_keys_of", meanwhile)
    ht.read(finder, tokens(100), path=path)
    assert refused[0]
    assert len(ht.Document.load(path, finder)) == 100


def test_who_waited_for_a_lock_does_not_spoil_what_was_finished(
    finder: ht.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is of a file that was finished and renamed meanwhile."""
    path, lock, raced = tmp_path / "x.homer", document_file.flock, []

    def late(*arguments: Any) -> None:
        if not raced:
            raced.append(1)
            ht.read(finder, tokens(100), path=path)
        lock(*arguments)

    (tmp_path / "x.homer.partial").touch()
    monkeypatch.setattr(document_file, "flock", late)
    ht.read(finder, tokens(200, seed=3), path=path)
    assert len(ht.Document.load(path, finder)) == 200
    assert os.listdir(tmp_path) == ["x.homer"]


def test_a_failed_reading_lets_go_of_its_file(
    finder: ht.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_keys_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as held:
        ht.read(finder, tokens(100), path=tmp_path / "x.homer")
    monkeypatch.undo()
    ht.read(finder, tokens(100), path=tmp_path / "x.homer")
    assert held  # with its traceback, and so the failed call's variables


def test_a_file_that_is_replaced_keeps_its_mode(finder: ht.Llama, tmp_path: Path) -> None:
    path = tmp_path / "x.homer"
    path.write_text("old")
    path.chmod(0o600)
    ht.read(finder, tokens(100), path=path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("window", [16, 60, 64, 128])
def test_a_short_window_is_kept(window: int) -> None:
    peer = random_model(
        "mistral",
        sliding_window=window,
        layer_types=["sliding_attention"] * 3,
        max_position_embeddings=512,
    )
    model = ht.from_transformers(peer, ops="torch")
    ids = torch.randint(3, 90, (700,), generator=torch.Generator().manual_seed(0))
    document = ht.read(model, ids)
    assert len(document.encode([5, 6, 7])) <= window


def test_an_answer_has_room_behind_the_question(worded: ht.Llama) -> None:
    document = ht.read(worded, text(900))
    assert document.room(3) == 253
    assert document.room(3, new_tokens=100) == 153
    answer = document.ask("w5 w6", max_new_tokens=100, grow=True)
    assert answer.encoded is not None
    assert answer.encoded.next_position <= worded.config.context_limit


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_every_float_type_reads_and_answers(kind: torch.dtype) -> None:
    model = ht.from_transformers(random_model(dtype=kind, max_position_embeddings=256), ops="torch")
    document = ht.read(model, list(range(3, 90)) * 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
        assert document.find([5, 6, 7])
        assert len(document.encode([5, 6, 7])) > 3


def test_names_of_texts_are_checked_before_reading(
    worded: ht.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("homer_triton.document.read_chunk", None)
    for name in (Path("a.txt"), "", 5):
        with pytest.raises(ValueError, match="A text is named"):
            ht.read(worded, {name: "w5 w6"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="names are too many or too long"):
        ht.read(worded, {"x" * 2**20: "w5 w6"})
    monkeypatch.undo()
    document = ht.read(worded, {"a": "w5 w6"})
    with pytest.raises(ValueError, match="There is a text 'a' already"):
        document.append("w7", name="a")
    with pytest.raises(ValueError, match="history holds pairs of texts"):
        document.ask("w5", history=[("w5", None)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": [[99, 0]]},
        {"heads": []},
        {"groups": 0},
        {"weights": [1.0]},
        {"texts": []},
        {"texts": [[None, 0, 299, 10]]},
        {"opening": ["a"]},
        {"overlap": None},
    ],
)
def test_a_file_with_a_false_description_is_refused(
    finder: ht.Llama, tmp_path: Path, changes: dict[str, Any]
) -> None:
    document = ht.read(finder, tokens(300))
    document._file.described.update(changes)
    given = {name: document._file.tensors[name] for name in document_file.GIVEN}
    described = document._file.described
    chunk_len = max(described["chunk_len"], 1)
    shape = tuple(document._file.tensors["keys"].shape)
    file = document_file.DocumentFile.create(
        described, given, shape, chunk_len, tmp_path / "x.homer"
    )
    for start in range(0, 300, chunk_len):
        rows = slice(start, start + chunk_len)
        stored = document._file.tensors
        file.put(start, stored["keys"][rows], stored["scales"][rows])
    file.finish()
    with pytest.raises(ValueError, match="damaged"):
        ht.Document.load(tmp_path / "x.homer", finder)


def test_a_text_that_is_kept_whole_answers_as_the_plain_model(
    worded: ht.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = text(150)
    document = ht.read(worded, words)
    whole = ht.HomerConfig(max_chunk_len=256, target_len=256)
    runs: list[int] = []
    run = ht.Llama.embed
    monkeypatch.setattr(
        ht.Llama, "embed", lambda self, ids: runs.append(ids.numel()) or run(self, ids)
    )
    for prefix, question in ((None, "w5 w6"), (None, "w9 w10 w11"), ("<s> w7", "w9")):
        expected = ht.encode(worded, words, prefix, question, whole)
        runs.clear()
        found = document.encode(question, prefix, keep="all")
        assert torch.equal(found.token_ids, expected.token_ids)
        torch.testing.assert_close(found.logits, expected.logits)
        asked = len(question.split())
        assert sum(runs) == asked + (0 if question == "w9 w10 w11" else len(expected) - asked)
    answer = document.ask("w5 w6", keep="all", max_new_tokens=4)
    assert {source.name for source in answer.sources} == {None}
    with pytest.raises(ValueError, match="leave keep out"):
        ht.read(worded, text(300)).encode("w5", keep="all")
    with pytest.raises(ValueError, match="keep='some' is not known"):
        document.encode("w5", keep="some")  # type: ignore[arg-type]


def test_the_callers_defaults_change_nothing(finder: ht.Llama) -> None:
    """Its default device, its default dtype and its autocast are for its own tensors."""
    ids = tokens(300)

    def everything() -> list[Any]:
        document = ht.read(finder, ids.tolist(), ht.HomerConfig(max_chunk_len=64)).append([5, 6])
        config = ht.HomerConfig(target_len=70)
        encoded = document.encode(ids[70:76].tolist(), config=config)
        found = document.find(ids[9:15].tolist())
        whole = document.encode([5, 6], keep="all")
        return [document._file.tensors["keys"], encoded.logits, whole.logits, found]

    expected = everything()
    for found in under_other_defaults(everything):
        for ours, theirs in zip(expected[:3], found[:3], strict=True):
            assert torch.equal(ours, theirs)
        assert found[3] == expected[3]
