"""`homer eval` from the command line to the folder, on a tiny random model."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CHAT_TEMPLATE, run
from eval_model import LIMIT, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import homer_triton as ht
from homer_triton.cli.eval_runs import layout_of
from homer_triton.evaluation.methods import make_readers, token_losses
from homer_triton.evaluation.perplexity import lay_out_documents

PASSKEY = ("eval", "passkey", "--methods", "plain,window,homer", "--lengths", "1x,384", "--depths")
PASSKEY = (*PASSKEY, "0,1", "--samples", 2, "--layers-warmup", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def passkeys(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "passkey"
    result = run(*PASSKEY, "--model", model, "-o", folder)
    assert result.exit_code == 0, result.output
    assert "homer" in result.stdout
    return folder


def read(folder: Path, name: str = "metrics.json") -> Any:
    return json.loads((folder / name).read_text())


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def figures(folder: Path) -> Any:
    """The figures but for times and memory, which no run repeats."""
    metrics = read(folder)
    for row in metrics["by_length"]:
        assert 0 < row.pop("seconds") < 60
        assert 0 <= row.pop("peak_bytes") < 2**30
    return metrics


def article(words: int) -> str:
    sentence = "the grass is green and the water of the river runs over the stone . "
    return sentence * (words // 14 + 1)


def write_quality(path: Path, **changes: Any) -> Path:
    question = {
        "question": "What is the grass?",
        "options": ["green", "blue and yellow", "stone", "water"],
        "gold_label": 2,
        "difficult": 1,
        **changes,
    }
    good = {"article": article(300), "questions": [question]}
    path.write_text("\n".join(json.dumps(entry) for entry in (good, good)) + "\n")
    return path


@pytest.mark.slow
def test_a_passkey_run_leaves_everything_behind(passkeys: Path) -> None:
    answers, metrics, config = predictions(passkeys), read(passkeys), read(passkeys, "config.json")
    assert len(answers) == 3 * 2 * 2 * 2
    assert not any("error" in answer for answer in answers)
    assert all(answer["tokens"] + 20 <= answer["length"] for answer in answers)
    assert all(answer["rows"] <= LIMIT for answer in answers if answer["method"] != "plain")
    asked = {(a["length"], a["depth"], a["key"]) for a in answers}
    assert len(asked) == 8
    assert [row["total"] for row in metrics["by_length"]] == [4] * 6
    assert len(metrics["by_depth"]) == 12
    assert config["settings"]["fingerprint"]
    assert {"torch", "transformers", "homer_triton", "python"} <= config["environment"].keys()
    for name in ("accuracy_by_length.png", "depth_by_length.png"):
        assert (passkeys / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_result(
    passkeys: Path, model: Path, tmp_path: Path
) -> None:
    whole = (passkeys / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "config.json").write_bytes((passkeys / "config.json").read_bytes())
    (tmp_path / "predictions.jsonl").write_bytes(b"".join(whole[:9]) + whole[9][:30])
    result = run(*PASSKEY, "--model", model, "-o", tmp_path, "--no-plots")
    assert "9 predictions already" in result.stderr
    assert predictions(tmp_path)[:9] == predictions(passkeys)[:9]
    texts = [[(a["id"], a["text"]) for a in predictions(f)] for f in (tmp_path, passkeys)]
    assert texts[0] == texts[1]
    assert figures(tmp_path) == figures(passkeys)
    assert not list(tmp_path.glob("*.png"))


def test_another_seed_in_the_same_folder_is_refused(passkeys: Path, model: Path) -> None:
    before = {file.name: file.read_bytes() for file in passkeys.iterdir()}
    result = run(*PASSKEY, "--model", model, "-o", passkeys, "--seed", 1)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "other settings (seed)" in result.stderr
    assert {file.name: file.read_bytes() for file in passkeys.iterdir()} == before


def test_a_question_that_fails_counts_as_wrong(model: Path, tmp_path: Path) -> None:
    arguments = ("--methods", "homer", "--lengths", "8x", "--samples", 1, "--depths", "0.5")
    result = run(
        *("eval", "passkey", "--model", model, "-o", tmp_path / "run", *arguments),
        *("--layers-warmup", 5, "--no-plots", "--json"),
    )
    assert result.exit_code == 0
    (row,) = json.loads(result.stdout)["by_length"]
    assert (row["right"], row["total"], row["errors"]) == (0, 1, 1)
    (answer,) = predictions(tmp_path / "run")
    assert "lower layers_warmup" in answer["error"]


def test_perplexity_follows_the_protocol(model: Path, tmp_path: Path) -> None:
    llama, text = ht.load(model), article(500)
    task = lay_out_documents(llama, {"a": text}, None, None)
    assert (task.segment, task.affix) == (64, 3)
    assert task.positions["a"][:3] == (0, 128, 192)
    assert task.positions["a"][-1] + 64 <= len(task.documents["a"]) < task.positions["a"][-1] + 128
    few = lay_out_documents(llama, {"a": text}, 400, 2)
    assert few.positions["a"] == (0, 128, 320)
    assert few.documents["a"].tolist() == task.documents["a"][:400].tolist()
    assert int(few.documents["a"][0]) == 1


@pytest.mark.slow
def test_plain_perplexity_is_transformers(model: Path, tmp_path: Path) -> None:
    documents = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for words, document in zip((400, 420), documents, strict=True):
        document.write_text(article(words))
    arguments = ("--max-length", "3x", "--methods", "plain,window,homer", "--layers-warmup", 0)
    texts = [part for document in documents for part in ("--text", document)]
    output = tmp_path / "run"
    result = run("eval", "perplexity", "--model", model, "-o", output, *texts, *arguments)
    assert result.exit_code == 0, result.output
    peer = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = torch.tensor(tokenizer(documents[0].read_text())["input_ids"][: 3 * LIMIT])
    with torch.no_grad():
        logits = peer(tokens[None, :-1]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    found = {answer["id"]: answer["loss"] for answer in predictions(output)}
    name = f"plain/{documents[0]}"
    assert found[f"{name}/0"] == pytest.approx(losses[:127].mean().item(), abs=1e-3)
    assert found[f"{name}/128"] == pytest.approx(losses[127:191].mean().item(), abs=1e-3)
    assert found[f"{name}/320"] == pytest.approx(losses[319:383].mean().item(), abs=1e-3)
    metrics = read(output)
    overall = {row["method"]: row for row in metrics["overall"]}
    assert overall["plain"]["segments"] == 10
    assert all(row["low"] < row["perplexity"] < row["high"] for row in metrics["overall"])
    assert {row["position"] for row in metrics["by_position"]} == {128, 192, 256, 320, 384}
    by_reference = metrics["by_reference"]
    assert {(row["method"], row["reference"]) for row in by_reference} == {
        (name, kind) for name in ("plain", "window", "homer") for kind in ("near", "far", "new")
    }
    for name in ("plain", "window", "homer"):
        later = [answer for answer in predictions(output) if answer["id"].startswith(name)]
        later = [answer for answer in later if answer["position"]]
        rows = [row for row in by_reference if row["method"] == name and row["tokens"]]
        assert sum(row["tokens"] for row in rows) == 8 * 64
        lost = sum(row["tokens"] * math.log(row["perplexity"]) for row in rows)
        assert lost == pytest.approx(sum(64 * answer["loss"] for answer in later))
    for row in by_reference:
        (window,) = (
            other
            for other in by_reference
            if (other["method"], other["reference"]) == ("window", row["reference"])
        )
        if row["tokens"]:
            ratio = row["perplexity"] / window["perplexity"]
            assert row["times_window"] == pytest.approx(ratio)
            assert row["times_window_low"] <= row["times_window"] <= row["times_window_high"]
    assert (output / "perplexity_by_position.png").read_bytes().startswith(b"\x89PNG")


def test_references_are_told_apart_by_what_the_window_holds(model: Path) -> None:
    llama = ht.load(model)
    task = lay_out_documents(llama, {"a": article(500)}, None, None)
    start, oldest = 320, 320 - (LIMIT - task.affix - task.segment)
    tokens = torch.full((start + task.segment,), 5)
    tokens[0], tokens[oldest - 1], tokens[oldest], tokens[start - 1] = 6, 7, 8, 9
    tokens[start : start + 7] = torch.tensor([5, 6, 7, 8, 9, 10, 10])
    kinds = task.references(tokens, start)
    assert kinds[:7] == ["near", "near", "far", "near", "near", "new", "near"]
    assert set(kinds[7:]) == {"near"}

    def window_loss(changed: int) -> float:
        other = tokens.clone()
        other[changed] = 11
        reader = make_readers(("window",), llama, ht.HomerConfig())["window"]
        segment = other[start:]
        affix = task.affix
        prefix, context, suffix = (
            other[:affix],
            other[affix : start - affix],
            other[:start][-affix:],
        )
        return sum(token_losses(reader(prefix, context, suffix, len(segment)), segment))

    assert window_loss(oldest - 2) == window_loss(oldest - 1) != window_loss(oldest)


@pytest.mark.slow
def test_a_failed_segment_leaves_no_perplexity(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(article(400))
    result = run(
        *("eval", "perplexity", "--model", model, "--text", tmp_path / "a.txt", "--methods"),
        *("homer", "-o", tmp_path / "run", "--layers-warmup", 5, "--max-length", "3x", "--json"),
    )
    assert result.exit_code == 0
    metrics = json.loads(result.stdout)
    (overall,) = metrics["overall"]
    assert overall["perplexity"] is None
    assert overall["errors"] == 4
    first, *later = metrics["by_position"]
    assert first["perplexity"] > 0
    assert all(row["perplexity"] is None and row["running"] is None for row in later)
    assert all(row["perplexity"] is None for row in metrics["by_reference"])
    assert not any("times_window" in row for row in metrics["by_reference"])


@pytest.mark.slow
def test_quality_chooses_the_likeliest_option(model: Path, tmp_path: Path) -> None:
    data, output = write_quality(tmp_path / "dev.jsonl"), tmp_path / "run"
    result = run(
        *("eval", "quality", "--model", model, "--data", data, "--methods", "plain,homer"),
        *("-o", output, "--layers-warmup", 0),
    )
    assert result.exit_code == 0, result.output
    answers = predictions(output)
    assert [answer["id"] for answer in answers[:2]] == ["plain/0/0", "homer/0/0"]
    peer = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = article(300) + "\nQuestion: What is the grass?\nAnswer:"
    before = tokenizer(text)["input_ids"]
    expected = []
    for option in ("green", "blue and yellow", "stone", "water"):
        ids = tokenizer(option, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = peer(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1]
        expected.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).item())
    assert answers[0]["losses"] == pytest.approx(expected, abs=1e-3)
    assert answers[0]["choice"] == expected.index(min(expected))
    assert answers[0]["right"] == (answers[0]["choice"] == 1)
    rows = read(output)["by_method"]
    assert [(row["method"], row["subset"], row["total"]) for row in rows] == [
        ("plain", "all", 2),
        ("plain", "hard", 2),
        ("homer", "all", 2),
        ("homer", "hard", 2),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Line 3 of .* cannot be used"),
        ("[" * 200_000, "Line 3 of .* cannot be used"),
        ("[]", "Line 3 .* it has no article"),
        ('{"article": "a"}', "Line 3 .* it has no list of questions"),
        ('{"article": "a", "questions": [7]}', "question 1 is not an object"),
        ('{"article": "a", "questions": [{"question": "b", "options": ["c"]}]}', "no list of two"),
        (
            '{"article": "a", "questions": [{"question": "b", "options": ["c", "d"]}]}',
            "gold_label None, not a number from 1 to 2",
        ),
        (
            '{"article": "a", "questions": [{"options": ["c", "d"], "gold_label": 1}]}',
            "it has no question",
        ),
    ],
)
def test_a_broken_data_line_is_named(model: Path, tmp_path: Path, line: str, reason: str) -> None:
    data = write_quality(tmp_path / "dev.jsonl")
    data.write_text(data.read_text() + line + "\n")
    result = run("eval", "quality", "--model", model, "--data", data, "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert re.search(reason, result.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("passkey", "--methods", "plain,rag"), "'rag' is not known"),
        (("passkey", "--lengths", "32"), "the key and the question alone take"),
        (("passkey", "--lengths", "4y"), "'4y' is neither a number of tokens"),
        (("passkey", "--lengths", "0"), "at least one token"),
        (("passkey", "--lengths", ","), "--lengths is empty"),
        (("passkey", "--depths", "0,2"), "must be numbers from 0 to 1"),
        (("passkey", "--depths", "top"), "must be numbers from 0 to 1"),
        (("perplexity", "--text", "SHORT"), "the protocol needs at least 192"),
        (("perplexity", "--text", "MISSING"), "There is no file"),
        (("quality", "--data", "MISSING"), "There is no file"),
        (("quality", "--data", "EMPTY"), "holds no questions"),
        (("ablation", "--max-chunk-len", "0"), "must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "SHORT").write_text(article(100))
    (tmp_path / "EMPTY").write_text("\n")
    places = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    result = run("eval", *places, "--model", model, "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert reason in result.stderr
    assert not (tmp_path / "run").exists()


def test_chat_templates_surround_the_text_unless_turned_off(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert layout_of(tokenizer, True)("Where?") == ("<s>w10 ", "\nWhere? w11 w12")
    assert layout_of(tokenizer, False)("Where?") == (None, "\nWhere?")


def test_missing_matplotlib_is_said_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("eval", "passkey", "--model", model, "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert "pip install 'homer_triton[plots]'" in result.stderr
    assert not (tmp_path / "run").exists()
