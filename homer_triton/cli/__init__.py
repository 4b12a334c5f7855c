"""The `homer` command: one module per subcommand.

Commands import the library inside their functions, and nothing else here imports torch: `homer
--help` and a misspelt option answer at once.
"""

from .interrupts import heard_interrupts, leave_interrupted, was_interrupted


def main() -> None:
    """Run the command line and exit: 0, 2 for bad input, 130 when interrupted."""
    try:
        with heard_interrupts():
            from .commands import app
            from .streams import checked_streams

            with checked_streams():
                app(prog_name="homer")
    except KeyboardInterrupt:
        leave_interrupted()
    except SystemExit as left:
        if left.code and was_interrupted():  # while options were read, which typer ends in silence
            leave_interrupted()
        raise
