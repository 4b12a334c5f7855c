"""Groups of options: HomerConfig's settings, and how commands take any group."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from homer_triton import Calibration, HomerConfig
from homer_triton.cli.groups import given_options, with_groups
from homer_triton.cli.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Place:
    """A group that others have."""

    town: Annotated[str, typer.Option("--town")] = "Bath"
    street: Annotated[str, typer.Option("--street")]


@dataclass(frozen=True, kw_only=True)
class House(Place):
    """One that has another's options, one of them with another default."""

    number: Annotated[int, typer.Option("--number")] = 1
    town: Annotated[str, typer.Option("--town", help="Where it stands.")] = "London"


def run(command: Any, *arguments: object) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def parse(*arguments: object) -> tuple[Settings, str]:
    """What a command with all settings and an option of its own gets."""
    seen: list[Any] = []

    @with_groups
    def command(settings: Settings, suffix: str = "text") -> None:
        seen.extend([settings, suffix])

    result = run(command, *arguments)
    assert result.exit_code == 0, result.output
    settings, suffix = seen
    return settings, suffix


def test_every_setting_is_an_option() -> None:
    names = [{field.name for field in fields(owner)} for owner in (Settings, HomerConfig)]
    assert names[0] == names[1]


def test_what_is_left_out_is_left_to_the_library() -> None:
    settings, suffix = parse()
    assert (settings.config, suffix) == (HomerConfig(), "text")
    assert given_options(settings) == []
    assert settings.files == {"--calibration": None}


def test_what_is_given_arrives_zeros_included(tmp_path: Path) -> None:
    file = tmp_path / "bias.safetensors"
    Calibration(torch.zeros(2, 8)).save(file)
    options = ("--max-chunk-len", 64, "--layers-warmup", 0, "--cuda-graphs", "--suffix", "own")
    settings, suffix = parse(*options, "--calibration", file)
    config = settings.config
    assert (config.max_chunk_len, config.layers_warmup, config.cuda_graphs) == (64, 0, True)
    assert config.calibration is not None
    assert suffix == "own"
    assert settings.files == {"--calibration": file}
    assert given_options(settings) == [
        "--max-chunk-len",
        "--layers-warmup",
        "--cuda-graphs",
        "--calibration",
    ]


def test_an_option_can_be_left_out_of_a_command() -> None:
    @with_groups(but=("cuda_graphs",))
    def command(settings: Settings) -> None: ...

    help_text = run(command, "--help").output
    assert "--max-chunk-len" in help_text
    assert "--cuda-graphs" not in help_text


@pytest.mark.parametrize("arguments", [["--layers-warmup", "-1"], ["--memory-budget", "much"]])
def test_values_out_of_range_are_refused(arguments: list[str]) -> None:
    settings, _ = parse(*arguments)
    with pytest.raises(ValueError, match=r"layers_warmup=-1|'much' is not a size"):
        _ = settings.config


def test_a_group_has_the_options_of_those_that_it_extends() -> None:
    seen: list[object] = []

    @with_groups
    def command(house: House, loud: bool = False) -> None:
        seen.append(house)

    assert run(command, "--street", "Strand").exit_code == 0
    assert run(command, "--street", "Mall", "--town", "York", "--number", 3).exit_code == 0
    assert seen == [House(street="Strand"), House(street="Mall", town="York", number=3)]
    assert given_options(seen[0]) == ["--street"]
    assert given_options(seen[1]) == ["--number", "--town", "--street"]
    assert run(command).exit_code == 2  # no street
    help_text = run(command, "--help").output
    assert help_text.index("--number") < help_text.index("--town")
    assert "Where it stands." in help_text
