"""All subcommands of `homer`."""

from typing import Annotated

import typer

from .. import __version__
from .ask import ask
from .calibrate import calibrate
from .chat import chat
from .compress import compress
from .demo import demo
from .encode import encode
from .errors import ReportingGroup
from .eval import app as evaluations
from .generate import generate
from .help import Command
from .plan import plan
from .read import read
from .serve import serve
from .show import show

app = typer.Typer(
    name="homer",
    cls=ReportingGroup,
    help="""Read texts many times longer than a model's context limit, without training.

    HOMER (ICLR 2024) splits a long text into chunks, keeps the tokens that matter and merges the
    chunks into one short KV cache. A pretrained language model then answers from this cache.

    \b
    First steps:
      homer demo               see it work on a small model (about a minute)
      homer generate --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          --context-file book.txt --prompt "Who tells the story?"
      homer COMMAND --help     all options of a command
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"homer {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
        ),
    ] = False,
) -> None: ...


for command in (demo, read, ask, generate, chat, serve, encode, compress, show, plan, calibrate):
    app.command(cls=Command)(command)
app.add_typer(evaluations, name="eval")
