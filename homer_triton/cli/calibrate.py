"""`homer calibrate`: measure the bias that makes near and far tokens comparable."""

from pathlib import Path
from typing import Annotated

import typer

from .groups import with_groups
from .help import SETTINGS
from .inputs import read_text
from .options import Checkpoint, Json
from .output import at_terminal, print_json


@with_groups
def calibrate(
    *,
    checkpoint: Checkpoint,
    text: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="FILE",
            help="Ordinary text, a UTF-8 file. Repeat the option for more files. Use - for "
            "standard input.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file for the calibration. Its name must end in .safetensors.",
        ),
    ],
    segment_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=SETTINGS,
            help="The tokens in a segment. The calibration fits chunks of up to this length.",
            show_default="the default length of a chunk",
        ),
    ] = None,
    num_segments: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=SETTINGS,
            help="How many segments the mean is taken over.",
        ),
    ] = 100,
    as_json: Json = False,
) -> None:
    """Measure a model's distance bias, for --selection paper.

    A token pays more attention to near tokens, whatever they say. This command measures the mean
    attention score at each distance, over segments of ordinary text. With --calibration FILE, other
    commands subtract this bias before they compare tokens. Only the paper's selection uses it; the
    default selection needs no calibration.

    \b
    Example:
      homer calibrate --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          --text book.txt -o bias.safetensors
    """
    from .. import calibrate as measure
    from ..storage.files import check_outputs

    check_outputs({"-o": output}, {"--text": text, "--model": checkpoint.model})
    if output.suffix != ".safetensors":
        raise ValueError(f"The name of the calibration {output} must end in .safetensors.")
    texts = [read_text(file) for file in text]
    llama, _ = checkpoint.open()
    calibration = measure(llama, texts, segment_len, num_segments, progress=at_terminal())
    calibration.save(output)
    layers, distances = calibration.bias.shape
    if as_json:
        print_json(
            {
                "output": str(output),
                "layers": layers,
                "distances": distances,
                "model": calibration.model,
            }
        )
    else:
        print(f"{output}: {layers} layers, distances 0 to {distances - 1}")
