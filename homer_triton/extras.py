"""Packages that only some evaluations need: the `eval` extra."""

from importlib import import_module


def require(package: str, what: str) -> None:
    """Raise `ValueError` where a package is missing: to be asked before hours of work.

    what: that which needs it, as the message begins.
    """
    try:
        import_module(package)
    except ImportError:
        raise ValueError(f"{what} needs {package}: pip install 'homer_triton[eval]'.") from None
