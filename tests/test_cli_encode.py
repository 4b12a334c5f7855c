"""`homer encode` and `homer generate`, together and against the library."""

import json
from pathlib import Path

import pytest
import torch
from command_line import checkpoint, run, text

import homer_triton as ht


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model and chat, two checkpoints; context.txt, a text of 100 tokens."""
    folder = tmp_path_factory.mktemp("cli")
    checkpoint(folder / "model")
    checkpoint(folder / "chat", chat=True)
    (folder / "context.txt").write_text(text(100))
    return folder


def test_encode_saves_what_the_library_encodes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = run(
        *("encode", "--model", folder / "model", "--context-file", folder / "context.txt"),
        *("-o", output, "--prompt", "w5 w6", "--max-chunk-len", 30, "--target-len", 20),
        *("--layers-warmup", 0, "--recompute", "suffix", "--selection", "votes,window=3"),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(str(output))
    assert "kept 20 of 103 tokens (4 chunks, " in result.stderr
    config = ht.HomerConfig(30, 20, 0, selection="votes,window=3", recompute="suffix")
    model = ht.load(folder / "model")
    expected = ht.encode(model, text(100), suffix="w5 w6", config=config)
    saved = ht.EncodedContext.load(output)
    assert torch.equal(saved.keys, expected.keys)
    assert torch.equal(saved.source_indices, expected.source_indices)


def test_encode_json_is_one_object(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    result = run(
        *("encode", "--model", folder / "model", "--context-file", "-", "-o", output, "--json"),
        stdin=text(100),
    )
    report = json.loads(result.stdout)
    saved = ht.EncodedContext.load(output)
    assert report["output"] == str(output)
    assert report["stats"]["tokens"] == 101
    assert report["stats"]["kept_tokens"] == len(saved)
    assert report["next_position"] == saved.next_position
    assert report["plan"] == saved.plan.to_dict()


def test_generate_streams_the_librarys_answer(folder: Path) -> None:
    result = run(
        *("generate", "--model", folder / "model", "--context-file", folder / "context.txt"),
        *("--prompt", "w5 w6", "--max-new-tokens", 6),
    )
    assert result.exit_code == 0, result.stderr
    model = ht.load(folder / "model")
    encoded = ht.encode(model, text(100), suffix="w5 w6")
    assert result.stdout.strip() == ht.generate(model, encoded, max_new_tokens=6).text.strip()
    assert f"kept {len(encoded)} of 103 tokens" in result.stderr


@pytest.mark.slow
def test_generate_applies_the_chat_template(folder: Path) -> None:
    options = (
        *("generate", "--model", folder / "chat", "--context-file", folder / "context.txt"),
        *("--prompt", "w5 w6", "--max-new-tokens", 6, "--json"),
    )
    report = json.loads(run(*options).stdout)
    model = ht.load(folder / "chat")
    encoded = ht.encode(model, text(100), prefix="<s>w10", suffix="w5 w6 w11 w12")
    assert report["stats"]["tokens"] == 106
    assert report["answers"][0]["token_ids"] == ht.generate(model, encoded, None, 6).token_ids
    bare = json.loads(run(*options, "--no-chat-template").stdout)
    assert bare["stats"]["tokens"] == 103


def test_many_prompts_share_one_encoding(folder: Path, tmp_path: Path) -> None:
    model = ht.load(folder / "model")
    encoded = ht.encode(model, text(100))
    expected = [ht.generate(model, encoded, p, 5).token_ids for p in ("w5 w6", "w7")]
    asked = ("--prompt", "w5 w6", "--prompt", "w7", "--max-new-tokens", 5)
    source = ("--context-file", folder / "context.txt")

    direct = run("generate", "--model", folder / "model", *source, *asked, "--json")
    assert [a["token_ids"] for a in json.loads(direct.stdout)["answers"]] == expected

    output = tmp_path / "out.safetensors"
    run("encode", "--model", folder / "model", *source, "-o", output)
    again = run("generate", "--model", folder / "model", "--encoded", output, *asked, "--json")
    assert [a["token_ids"] for a in json.loads(again.stdout)["answers"]] == expected

    words = run("generate", "--model", folder / "model", "--encoded", output, *asked)
    assert [line for line in words.stdout.splitlines() if line.startswith("> ")] == [
        "> w5 w6",
        "> w7",
    ]


def test_one_prompt_for_an_encoding_is_appended(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    source = ("--context-file", folder / "context.txt")
    run("encode", "--model", folder / "chat", *source, "-o", output)
    result = run(
        *("generate", "--model", folder / "chat", "--encoded", output, "--prompt", "w5"),
        *("--max-new-tokens", 5, "--json"),
    )
    model = ht.load(folder / "chat")
    encoded = ht.encode(model, text(100), prefix="<s>w10")
    expected = ht.generate(model, encoded, "w5 w11 w12", 5).token_ids
    assert json.loads(result.stdout)["answers"][0]["token_ids"] == expected


def test_sampling_is_repeatable(folder: Path) -> None:
    options = (
        *("generate", "--model", folder / "model", "--context-file", folder / "context.txt"),
        *("--max-new-tokens", 12, "--temperature", 2.0, "--top-k", 40, "--json"),
    )

    def token_ids(seed: int) -> list[int]:
        return json.loads(run(*options, "--seed", seed).stdout)["answers"][0]["token_ids"]

    assert token_ids(1) == token_ids(1)
    assert token_ids(1) != token_ids(2)
