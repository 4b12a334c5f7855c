"""All subcommands of `homer`."""

import typer

from .calibrate import calibrate
from .chat import chat
from .compress import compress
from .demo import demo
from .encode import encode
from .errors import ReportingGroup
from .eval import app as evaluations
from .generate import generate
from .plan import plan
from .serve import serve
from .show import show

app = typer.Typer(
    name="homer",
    cls=ReportingGroup,
    help="""Long contexts on pre-trained models, without training: a text many times the
    model's context limit is merged, chunk by chunk and layer by layer, into a short KV cache
    (HOMER, ICLR 2024).

    Start with `homer demo`, then `homer generate --help`.""",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, generate, chat, serve, encode, compress, calibrate, plan, show):
    app.command()(command)
app.add_typer(evaluations, name="eval")
