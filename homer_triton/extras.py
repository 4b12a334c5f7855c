"""Packages that only some commands need: the extras."""

from importlib import import_module


def require(package: str, what: str, extra: str = "eval") -> None:
    """Raise `ValueError` where a package is missing: to be asked before hours of work.

    what: that which needs it, as the message begins; extra: which extra has it.
    """
    try:
        import_module(package)
    except ImportError:
        raise ValueError(f"{what} needs {package}: pip install 'homer_triton[{extra}]'.") from None
