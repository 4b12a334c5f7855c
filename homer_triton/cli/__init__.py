"""The `homer` command: one module per subcommand.

Commands import the library inside their functions, and nothing else here imports torch: `homer
--help` and a misspelt option answer at once.
"""

import logging

from .interrupts import Interrupted, heard_interrupts, leave_interrupted, was_interrupted

# transformers imports torchao where it is installed, which tells of kernels that it has not.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def main() -> None:
    """Run the command line and exit: 0, 2 for bad input, 130 when interrupted."""
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with heard_interrupts():
            from .commands import app
            from .streams import checked_streams

            with checked_streams():
                try:
                    app(prog_name="homer")
                except SystemExit as left:
                    # While options are read, typer ends in silence.
                    if left.code and was_interrupted() and not isinstance(left, Interrupted):
                        leave_interrupted()
                    raise
    except KeyboardInterrupt:
        leave_interrupted()
