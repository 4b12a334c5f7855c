"""The `homer` command: one module per subcommand.

Commands import the library inside their functions, and nothing else here imports torch. So `homer
--help`, and a misspelt option, answer at once.
"""

from .. import quiet as quiet
from .interrupts import Interrupted, heard_interrupts, leave_interrupted, was_interrupted


def main() -> None:
    """Run the command line and exit: 0, 2 for bad input, 130 when interrupted."""
    try:
        with heard_interrupts():
            from .commands import app
            from .streams import checked_streams

            with checked_streams():
                try:
                    app(prog_name="homer")
                except SystemExit as left:
                    # If interrupted while it reads options, typer exits without a message.
                    if left.code and was_interrupted() and not isinstance(left, Interrupted):
                        leave_interrupted()
                    raise
    except KeyboardInterrupt:
        leave_interrupted()
