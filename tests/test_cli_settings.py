"""HomerConfig's settings as a command's options."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from homer_triton import Calibration, HomerConfig
from homer_triton.cli.settings import SETTINGS, given_options, with_settings


def parse(*arguments: object) -> tuple[HomerConfig, str]:
    """What a command with all settings and an option of its own gets."""
    seen: list[Any] = []

    @with_settings
    def command(suffix: str = "text", *, config: HomerConfig) -> None:
        seen.extend([config, suffix])

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    config, suffix = seen
    return config, suffix


def test_every_setting_is_an_option() -> None:
    assert SETTINGS.keys() == {field.name for field in fields(HomerConfig)}


def test_what_is_left_out_is_left_to_the_library() -> None:
    assert parse() == (HomerConfig(), "text")
    assert given_options(HomerConfig()) == []


def test_what_is_given_arrives_zeros_included(tmp_path: Path) -> None:
    file = tmp_path / "bias.safetensors"
    Calibration(torch.zeros(2, 8)).save(file)
    options = ("--max-chunk-len", 64, "--layers-warmup", 0, "--cuda-graphs", "--suffix", "own")
    config, suffix = parse(*options, "--calibration", file)
    assert (config.max_chunk_len, config.layers_warmup, config.cuda_graphs) == (64, 0, True)
    assert config.calibration is not None
    assert suffix == "own"
    assert given_options(config) == [
        "--max-chunk-len",
        "--layers-warmup",
        "--cuda-graphs",
        "--calibration",
    ]


def test_a_setting_can_be_left_out_of_a_command() -> None:
    @with_settings(but=("cuda_graphs",))
    def command(*, config: HomerConfig) -> None: ...

    app = typer.Typer()
    app.command()(command)
    help_text = CliRunner().invoke(app, ["--help"]).output
    assert "--max-chunk-len" in help_text
    assert "--cuda-graphs" not in help_text


@pytest.mark.parametrize("arguments", [["--layers-warmup", "-1"], ["--memory-budget", "much"]])
def test_values_out_of_range_are_refused_before_the_command_runs(arguments: list[str]) -> None:
    ran: list[HomerConfig] = []

    @with_settings
    def command(*, config: HomerConfig) -> None:
        ran.append(config)

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError)
    assert not ran
