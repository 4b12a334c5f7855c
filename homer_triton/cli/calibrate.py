"""`homer calibrate`: the bias that makes near and far tokens comparable."""

from pathlib import Path
from typing import Annotated

import typer

from .groups import with_groups
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
            help="Ordinary text in UTF-8; give the option again for more files, - for standard "
            "input.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the calibration goes.")
    ],
    segment_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Tokens in a segment; a calibration serves chunks up to this long.",
            show_default="a chunk's default length",
        ),
    ] = None,
    num_segments: Annotated[
        int, typer.Option(metavar="N", min=1, help="Segments that the mean is taken over.")
    ] = 100,
    as_json: Json = False,
) -> None:
    """Measure what a model's attention pays to a token's distance alone, for --calibration.

    A last token favours near tokens whatever they say; the mean score at each distance, over
    segments of ordinary text, is taken off before tokens are compared.

    \b
    Example:
      homer calibrate --model meta-llama/Llama-3.2-1B --text book.txt \\
          -o llama.calibration.safetensors
    """
    from .. import calibrate as measure
    from ..storage.files import check_outputs

    check_outputs({"-o": output}, {"--text": text, "--model": checkpoint.model})
    if output.suffix != ".safetensors":
        raise ValueError(f"The calibration {output} must be named .safetensors to be read again.")
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
