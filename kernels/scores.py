"""What a score makes of an attention logit, each a small Triton function.

To add one, write it here, give it an entry in `LOGITS` and in `checks.LOGITS`, and its definition
to `kernels.reference.score_rows`.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@triton.jit
def logit(logits: tl.tensor, log_totals: tl.tensor) -> tl.tensor:
    """The logit itself (HOMER, section 3.2)."""
    return logits


@triton.jit
def log_softmax(logits: tl.tensor, log_totals: tl.tensor) -> tl.tensor:
    """The log-probability, blind to a head's constant offset."""
    return logits - log_totals


@triton.jit
def softmax(logits: tl.tensor, log_totals: tl.tensor) -> tl.tensor:
    """The probability: what attention itself makes of the logit."""
    return tl.exp(logits - log_totals)


@dataclass(frozen=True)
class Logit:
    """A function of logits [A, N] and of the logarithm [A, 1] of their exponentials' sum over all
    rows that are seen, which is 0 where it is not used.
    """

    function: triton.runtime.KernelInterface
    uses_total: bool


LOGITS: dict[str, Logit] = {
    "logit": Logit(logit, uses_total=False),
    "log_softmax": Logit(log_softmax, uses_total=True),
    "softmax": Logit(softmax, uses_total=True),
}
