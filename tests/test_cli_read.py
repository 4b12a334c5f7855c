"""`homer read` and `homer ask`, against the library."""

import json
import warnings
from pathlib import Path

import pytest
from command_line import checkpoint, run, text

import homer_triton as ht

pytestmark = pytest.mark.filterwarnings("ignore:The model has no retrieval heads")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two texts, and book.homer, the document of both."""
    folder = tmp_path_factory.mktemp("read")
    checkpoint(folder / "model", chat=True)
    (folder / "one.txt").write_text("w5 w6 w7.\nw8 w9 w10.\n" * 20)
    (folder / "two.txt").write_text(text(90))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(
            *("read", folder / "one.txt", folder / "two.txt", "-o", folder / "book.homer"),
            *("--model", folder / "model", "--json"),
        )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] == 210
    return folder


def test_the_file_is_the_librarys_document(folder: Path) -> None:
    model = ht.load(folder / "model", device="cpu")
    document = ht.Document.load(folder / "book.homer", model)
    one, two = str(folder / "one.txt"), str(folder / "two.txt")
    texts = {name: Path(name).read_text() for name in (one, two)}
    assert [(text.name, text.content) for text in document.texts] == list(texts.items())
    assert document.find("w8 w9") == ht.read(model, texts).find("w8 w9")


def test_each_question_is_answered_with_its_places(folder: Path) -> None:
    questions = ("w8 w9", "w20 w27")
    prompts = [word for question in questions for word in ("--prompt", question)]
    options = ("--max-new-tokens", 4, "--target-len", 40)
    result = run("ask", folder / "book.homer", *prompts, *options, "--json")
    assert result.exit_code == 0, result.stderr
    document = ht.Document.load(folder / "book.homer", ht.load(folder / "model", device="cpu"))
    answers = json.loads(result.stdout)["answers"]
    for question, answer in zip(questions, answers, strict=True):
        config = ht.HomerConfig(target_len=40)
        expected = document.ask(question, config=config, max_new_tokens=4)
        assert answer["prompt"] == question
        assert answer["token_ids"] == expected.token_ids
        assert len(answer["sources"]) == len(expected.sources) > 0
        for place in answer["sources"]:
            content = Path(place["name"]).read_text()
            assert content[place["start"] : place["end"]] == place["text"]


def test_the_answer_streams_and_places_follow_on_stderr(folder: Path) -> None:
    options = ("--max-new-tokens", 4, "--target-len", 40)
    result = run("ask", folder / "book.homer", "--prompt", "w8 w9", *options)
    document = ht.Document.load(folder / "book.homer", ht.load(folder / "model", device="cpu"))
    config = ht.HomerConfig(target_len=40)
    expected = document.ask("w8 w9", config=config, max_new_tokens=4)
    assert result.stdout == expected.text + "\n"
    first = expected.sources[0]
    assert f"[{first.name}, {first.start:,}] " in result.stderr.splitlines()[0]


def test_the_whole_text_may_be_kept(folder: Path, tmp_path: Path) -> None:
    words = ("--model", folder / "model", "--prompt", "w8 w9", "--max-new-tokens", 2)
    (tmp_path / "short.txt").write_text(text(40))
    assert run("read", tmp_path / "short.txt", "-o", tmp_path / "x", *words[:2]).exit_code == 0
    result = run("ask", tmp_path / "x", *words, "--keep", "all", "--json")
    document = ht.Document.load(tmp_path / "x", ht.load(folder / "model", device="cpu"))
    expected = document.ask("w8 w9", keep="all", max_new_tokens=2)
    assert json.loads(result.stdout)["answers"][0]["token_ids"] == expected.token_ids
    long = run("ask", folder / "book.homer", *words, "--keep", "all")
    assert long.exit_code == 2
    assert "leave keep out" in long.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ask", "absent.homer", "--prompt", "w5"), "There is no document"),
        (("ask", "one.txt", "--prompt", "w5"), "is not a document, or is damaged"),
        (("ask", "book.homer", "--prompt", " "), "The question is empty"),
        (("ask", "book.homer", "--prompt", "w5", "--model", "other"), "by another model"),
        (("read", "one.txt", "one.txt", "-o", "x", "--model", "model"), "is named twice"),
        (("read", "absent.txt", "-o", "x", "--model", "model"), "There is no file"),
        (("read", "one.txt", "-o", "one.txt", "--model", "model"), "would write over"),
        (("read", "empty.txt", "-o", "x", "--model", "model"), "is empty"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text("")
    if not (folder / "other").exists():
        checkpoint(folder / "other", hidden_size=32)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (folder / "x").exists()
