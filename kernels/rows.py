"""How the row-wise ops see a tensor of any shape."""

from torch import Tensor

from .checks import require


def as_rows(name: str, x: Tensor) -> Tensor:
    """A view [batch, rows, width] of x [..., width], which may skip memory between rows.

    Raises `ValueError` where more than two leading dimensions do not merge without a copy.
    """
    if x.dim() <= 3:
        return x[(None,) * (3 - x.dim())]
    try:
        return x.view(1, -1, x.shape[-1])
    except RuntimeError:
        require(False, f"the stride of {name}", x.stride(), "that of evenly spaced rows")
        raise
