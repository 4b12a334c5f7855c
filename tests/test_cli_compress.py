"""`homer compress` on the demo checkpoint: the short text, where it goes, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import checkpoint, run
from typer.testing import Result

import homer_triton as ht
from homer_triton.demo import CHECKPOINT

FILLER = "The grass is green.\nThe sky is blue. " * 30
STORY = f"{FILLER}\n\nThe pass key is 71432. Remember it. 71432 is the pass key.\n\n{FILLER}"
QUESTION = "What is the pass key? The pass key is"
LINEAR = '{"rope_type": "linear", "factor": 4.0}'
SETTINGS = ("--max-chunk-len", 128, "--layers-warmup", 1, "--dtype", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """story.txt, and asked.safetensors and unasked.safetensors, its encodings with and without the
    question.
    """
    folder = tmp_path_factory.mktemp("compress")
    (folder / "story.txt").write_bytes(STORY.encode())
    model = ht.load(CHECKPOINT, dtype="float32")
    config = ht.HomerConfig(max_chunk_len=128, layers_warmup=1, target_len=100)
    ht.encode(model, STORY, suffix=QUESTION, config=config).save(folder / "asked.safetensors")
    ht.encode(model, STORY, config=config).save(folder / "unasked.safetensors")
    return folder


def compress(folder: Path, *options: object) -> Result:
    """`homer compress` of the story with the question."""
    source = ("--model", CHECKPOINT, "--context-file", folder / "story.txt", "--prompt", QUESTION)
    return run("compress", *source, *SETTINGS, *options)


def tokens(some: str) -> int:
    tokenizer = ht.load(CHECKPOINT).tokenizer
    assert tokenizer is not None
    return len(tokenizer(some, add_special_tokens=False)["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["token", "word", "sentence"])
def test_the_short_text_goes_to_stdout(folder: Path, unit: str) -> None:
    result = compress(folder, "--target-len", 60, "--unit", unit)
    assert result.exit_code == 0, result.stderr
    model = ht.load(CHECKPOINT, dtype="float32")
    assert model.tokenizer is not None
    affix = 1 + tokens(f"\n{QUESTION}")
    config = ht.HomerConfig(max_chunk_len=128, layers_warmup=1, target_len=60 + affix)
    encoded = ht.encode(model, STORY, suffix=f"\n{QUESTION}", config=config)
    assert int((encoded.pruned_at < 0).sum()) == 60 + affix
    short = encoded.text(model.tokenizer, 60, unit, source=STORY)  # type: ignore[arg-type]
    assert result.stdout == f"{short}\n"
    assert "71432" in short
    assert "What" not in short
    assert f"text: {tokens(short)} of {tokens(STORY):,} tokens\n" in result.stderr
    assert 50 <= tokens(short) <= 60


@pytest.mark.slow
def test_the_short_text_goes_to_a_file_as_it_is(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "short.txt"
    result = compress(folder, "--target-len", 60, "-o", output, "--gap", " [...] ")
    short = output.read_bytes().decode()
    assert result.stdout == f"{output}: {tokens(short)} of {tokens(STORY):,} tokens\n"
    assert " [...]\n" in short
    assert "…" not in short
    assert short + "\n" == compress(folder, "--target-len", 60, "--gap", " [...] ").stdout


def test_the_gap_may_be_empty(folder: Path) -> None:
    short = compress(folder, "--target-len", 60, "--gap", "").stdout
    assert "…" not in short
    assert set(short.split()) <= set(STORY.split())


@pytest.mark.slow
def test_json_is_one_object(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "short.txt"
    report = json.loads(compress(folder, "--target-len", 60, "--json").stdout)
    assert report["output"] is None
    assert f"{report['text']}\n" == compress(folder, "--target-len", 60).stdout
    assert report["tokens_in"] == tokens(STORY)
    assert report["tokens_out"] == tokens(report["text"])
    assert report["ratio"] == report["tokens_in"] / report["tokens_out"]
    assert report["stats"]["tokens"] == report["plan"]["context_len"] + 1 + tokens(QUESTION)
    written = json.loads(compress(folder, "--target-len", 60, "--json", "-o", output).stdout)
    assert written["output"] == str(output)
    assert output.read_bytes().decode() == written["text"] == report["text"]


def test_without_a_question_the_end_of_the_text_is_part_of_it(folder: Path) -> None:
    source = ("--model", CHECKPOINT, "--context-file", folder / "story.txt")
    report = json.loads(run("compress", *source, *SETTINGS, "--json").stdout)
    assert report["text"].endswith("The grass is green.\nThe sky is blue. ")
    assert report["tokens_in"] == tokens(STORY)
    assert report["tokens_out"] <= 128


def test_an_encoding_is_compressed_by_its_tokenizer_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = ht.EncodedContext.load(folder / "asked.safetensors")
    tokenizer = ht.load(CHECKPOINT).tokenizer
    assert tokenizer is not None
    monkeypatch.setattr("homer_triton.load", None)
    options = ("compress", "--model", CHECKPOINT, "--encoded", folder / "asked.safetensors")
    assert run(*options).stdout == encoded.text(tokenizer) + "\n"
    report = json.loads(run(*options, "--target-len", 30, "--json").stdout)
    assert report["text"] == encoded.text(tokenizer, 30)
    assert report["tokens_in"] == encoded.plan.context_len
    assert report["tokens_out"] <= 30


@pytest.mark.slow
def test_an_encoding_under_another_rope_is_compressed_under_it(tmp_path: Path) -> None:
    path = tmp_path / "scaled.safetensors"
    model = ht.load(CHECKPOINT, dtype="float32", rope_scaling=json.loads(LINEAR))
    config = ht.HomerConfig(max_chunk_len=128, layers_warmup=1, target_len=100)
    ht.encode(model, STORY, suffix=QUESTION, config=config).save(path)
    options = ("compress", "--model", CHECKPOINT, "--encoded", path)
    assert run(*options).exit_code == 2
    assert "grass" in run(*options, "--rope-scaling", LINEAR).stdout


def test_an_encoding_without_a_question_has_its_end_on_demand(folder: Path) -> None:
    options = ("compress", "--model", CHECKPOINT, "--encoded", folder / "unasked.safetensors")
    without, whole = run(*options, "--json"), run(*options, "--with-suffix", "--json")
    fewer, all_of_it = (json.loads(result.stdout)["tokens_in"] for result in (without, whole))
    assert all_of_it == tokens(STORY) == fewer + 16
    assert json.loads(whole.stdout)["text"].endswith("The grass is green. The sky is blue.")


@pytest.mark.slow
def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    story, encoded = folder / "story.txt", folder / "asked.safetensors"
    before = story.read_bytes(), encoded.read_bytes()
    link = tmp_path / "link.txt"
    link.symlink_to(story)
    text_source = ("--context-file", story, *SETTINGS)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((), "Give a text with --context-file, or an encoding with --encoded"),
        ((*text_source, "--encoded", encoded), "Give a text with --context-file"),
        (("--encoded", encoded, "--prompt", "Where?"), "--prompt cannot change what"),
        (("--encoded", encoded, "--max-chunk-len", 64), "--max-chunk-len cannot change what"),
        (("--encoded", encoded, "--rope-scaling", LINEAR), "was made by another model"),
        ((*text_source, "--with-suffix"), "--with-suffix goes with --encoded"),
        ((*text_source, "-o", story), "story.txt, which --context-file reads"),
        ((*text_source, "-o", link), "link.txt, which --context-file reads"),
        (("--encoded", encoded, "-o", encoded), "asked.safetensors, which --encoded reads"),
        ((*text_source, "-o", tmp_path), "Cannot write"),
        (("--encoded", encoded, "--target-len", 1, "--unit", "sentence"), "a single sentence"),
        (("--encoded", story), "is not an encoded context"),
        (("--context-file", tmp_path / "absent.txt"), "There is no file"),
    ]
    for options, reason in cases:
        result = run("compress", "--model", CHECKPOINT, *options)
        assert (result.exit_code, result.stdout) == (2, ""), reason
        sentence = result.stderr.splitlines()[-1]
        assert sentence.startswith("homer: "), reason
        assert reason in sentence
    assert (story.read_bytes(), encoded.read_bytes()) == before
    small = checkpoint(tmp_path / "model", words=20)
    other = run("compress", "--model", small, "--encoded", encoded)
    assert (other.exit_code, other.stdout) == (2, "")
    assert f"was made by another model than {small} (" in other.stderr
    fewer = tmp_path / "fewer"
    shutil.copytree(CHECKPOINT, fewer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, fewer / name)
    other = run("compress", "--model", fewer, "--encoded", encoded)
    assert (other.exit_code, other.stdout) == (2, "")
    assert "has only 20 tokens, the encoding holds higher ones" in other.stderr
    for option, value in (("--unit", "line"), ("--target-len", 0)):
        result = compress(folder, option, value)
        assert (result.exit_code, result.stdout) == (2, "")
        assert option in result.stderr
        assert len(result.stderr.splitlines()) <= 5
