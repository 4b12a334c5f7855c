"""`homer plan`: the tree in words and as JSON, from a config alone."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from command_line import checkpoint, run, text

import homer_triton as ht
from homer_triton import document
from homer_triton.config import parse_bytes
from homer_triton.engine.shares import Shares
from homer_triton.model.config import load_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without its weights."""
    folder = checkpoint(tmp_path_factory.mktemp("plan"))
    (folder / "model.safetensors").unlink()
    return folder


def test_json_holds_the_librarys_plan(model: Path) -> None:
    options = ("--context-len", 90, "--prefix-len", 2, "--suffix-len", 6, "--dtype", "bfloat16")
    report = json.loads(run("plan", "--model", model, *options, "--json").stdout)
    config = load_config(model)
    tree = ht.plan(config, 90, 2, 6)
    assert report["rows"] == tree.rows
    assert report["flops"] == tree.flops(config)
    assert report["memory_bytes"] == tree.memory(config, 2)
    assert report["prefill_memory_bytes"] == tree.prefill_memory(config, 2)
    on_cpu = json.loads(run("plan", "--model", model, *options, "--device", "cpu", "--json").stdout)
    assert on_cpu["memory_bytes"] == tree.memory(config, 2, on_gpu=False)
    assert [level["nodes"] for level in report["levels"]] == [4, 2, 1]
    assert report["levels"][-1]["last_layer"] == 3
    assert report["levels"][0]["rows_in"] == sorted(
        {2 + 6 + node.context for node in tree.levels[0].nodes}
    )


def test_matrices_that_are_unpacked_take_memory(model: Path) -> None:
    options = ("plan", "--model", model, "--context-len", 90, "--suffix-len", 6)
    options += ("--device", "cpu", "--json")
    plain, int8, fp8 = (
        json.loads(run(*options, *more).stdout)["memory_bytes"]
        for more in ((), ("--quantize", "int8"), ("--quantize", "fp8"))
    )
    config = load_config(model)
    largest = config.hidden_size * max(config.hidden_size, config.intermediate_size)
    assert int8 == plain + 2 * largest * config.dtype.itemsize
    assert fp8 == plain
    refused = run(*options, "--quantize", "int3")
    assert refused.exit_code == 2
    assert "quantize='int3' is not known" in refused.stderr


def test_words_show_every_level_and_both_costs(model: Path) -> None:
    result = run("plan", "--model", model, "--context-len", 102, "--suffix-len", 1)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["0", "4", "0", "to", "0", "26", "to", "28", "17"] in rows
    assert ["2", "1", "2", "to", "2", "32", "32"] in rows
    assert "the tree runs 3 of 3 layers, then the kept tokens are read once more" in result.stdout
    assert ["tokens", "in", "the", "cache", "32", "104", "30.8%"] in rows


def test_each_devices_share_is_said(model: Path) -> None:
    options = ("--context-len", 90, "--prefix-len", 2, "--suffix-len", 6, "--devices", 2)
    report = json.loads(run("plan", "--model", model, *options, "--json").stdout)
    config = load_config(model)
    plan = ht.plan(config, 90, 2, 6)
    first, second = Shares(plan, 2).costs(config, config.dtype.itemsize)
    assert report["devices"] == [asdict(first), asdict(second)]
    assert (first.leaves, second.leaves, first.sent) == (2, 2, 0)
    shown = run("plan", "--model", model, *options).stdout
    rows = [line.split() for line in shown.splitlines()]
    assert [row[:2] for row in rows[-5:-3]] == [["0", "2"], ["1", "2"]]
    assert second.time_share < first.time_share == first.flops / plan.flops(config) < 1
    assert 0 < second.memory <= first.memory <= plan.memory(config, config.dtype.itemsize)


def test_chunks_are_a_quarter_of_the_limit_within_bounds(tmp_path: Path) -> None:
    for limit, expected in ((256, 128), (2048, 1024), (8192, 2048), (131_072, 8192)):
        config = load_config(checkpoint(tmp_path / str(limit), max_position_embeddings=limit))
        assert ht.plan(config, 2 * expected, 1, 10).max_chunk_len == expected


def test_chunks_beyond_the_limit_are_noted(model: Path) -> None:
    options = ("plan", "--model", model, "--context-len", 200, "--max-chunk-len", 100)
    assert run(*options).stderr.startswith("chunks of 100 tokens are longer than the model's")
    yarn = ("--rope-scaling", '{"rope_type": "yarn", "factor": 2.0}')
    assert not run(*options, *yarn).stderr


def test_context_file_is_counted(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "context.txt"
    file.write_text(text(77))
    result = run("plan", "--model", model, "--context-file", file, "--suffix-len", 4, "--json")
    assert json.loads(result.stdout)["context_len"] == 77


def test_a_memory_budget_chooses_how_to_run(model: Path) -> None:
    options = ("plan", "--model", model, "--context-len", 100, "--suffix-len", 2)
    free = [run(*options, "--leaf-batch", n, "--json") for n in (1, 4)]
    few, many = (json.loads(result.stdout)["memory_bytes"] for result in free)
    for budget, at_once in ((many, {4, 8}), (few, {1, 2})):
        plan = json.loads(run(*options, "--memory-budget", budget, "--json").stdout)
        assert plan["leaf_batch"] in at_once
        assert plan["memory_bytes"] <= budget
    words = run(*options, "--offload", "cpu").stdout
    assert "4 chunks run at once; finished chunks wait in host memory" in words
    words = run(*options, "--leaf-batch", 1).stdout
    assert "1 chunk runs at once; finished chunks wait on the device" in words
    refused = run(*options, "--memory-budget", "1KB")
    assert refused.exit_code == 2
    assert "memory_budget=1KB is less than" in refused.stderr
    assert "device='toaster' is not known" in run(*options, "--device", "toaster").stderr
    unread = run(*options, "--memory-budget", "a lot")
    assert "memory_budget='a lot' is not a size" in unread.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [(5, 5), ("7", 7), ("3kB", 3000), ("3 KiB", 3072), ("1.5GiB", 3 << 29), ("2m", 2_000_000)],
)
def test_sizes_are_read_as_they_are_written(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


def test_a_size_may_have_more_digits_than_a_float_holds() -> None:
    assert parse_bytes("9" * 400) == int("9" * 400)


@pytest.mark.parametrize("tokens", [30, 48, 100])
def test_a_reading_takes_no_more_than_planned(
    tmp_path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path)
    options = ("plan", "--model", folder, "--context-len", tokens, "--suffix-len", 4)
    report = json.loads(run(*options, "--json").stdout)
    planned = report["reading"]
    read: list[int] = []
    read_chunk = document.read_chunk

    def counted(*arguments: Any) -> Any:
        read.append(arguments[-1])
        return read_chunk(*arguments)

    monkeypatch.setattr(document, "read_chunk", counted)
    with pytest.warns(UserWarning, match="no retrieval heads"):
        doc = ht.read(ht.load(folder, "cpu", ops="torch"), text(tokens))
    assert len(doc) == tokens
    assert planned["chunks"] == len(read)
    kept = sum(doc._file.tensors[name].nbytes for name in ("token_ids", "keys", "scales"))
    assert kept <= planned["kept"]
    words = run(*options).stdout
    assert f"(homer read): {len(read)} chunks of at most {planned['rows']} tokens" in words
