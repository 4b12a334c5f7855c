"""`homer calibrate`, and its result in `homer encode`."""

import json
from pathlib import Path

import torch
from command_line import checkpoint, run, text

import homer_triton as ht


def test_calibrate_saves_what_the_library_measures(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(text(100))
    second.write_text(text(50))
    output = tmp_path / "bias.safetensors"
    texts = ("--text", first, "--text", second, "--num-segments", 4)
    result = run("calibrate", "--model", model, *texts, "-o", output, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    llama = ht.load(model)
    expected = ht.calibrate(llama, [text(100), text(50)], num_segments=4)
    assert torch.equal(ht.Calibration.load(output).bias, expected.bias)
    assert report == {
        "output": str(output),
        "layers": 3,
        "distances": 32,
        "model": llama.fingerprint,
    }

    merged = tmp_path / "out.safetensors"
    source = ("--context-file", first, "-o", merged, "--calibration", output)
    assert run("encode", "--model", model, *source).exit_code == 0
    config = ht.HomerConfig(calibration=expected)
    assert torch.equal(
        ht.EncodedContext.load(merged).keys, ht.encode(llama, text(100), config=config).keys
    )


def test_calibrate_in_words(tmp_path: Path) -> None:
    output = tmp_path / "bias.safetensors"
    model = checkpoint(tmp_path / "model")
    result = run(
        *("calibrate", "--model", model, "--text", "-", "-o", output),
        *("--segment-len", 16, "--num-segments", 2),
        stdin=text(64),
    )
    assert result.stdout == f"{output}: 3 layers, distances 0 to 15\n"
