"""The scores that a prune can rank rows by, each a small Triton function of a logit.

The largest over heads counts. To add one, write it here, give it an entry in `SCORES`, and its
definition one in `kernels.reference`.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@triton.jit
def max_logit(logits: tl.tensor, log_total: tl.tensor) -> tl.tensor:
    """The paper's score (HOMER, section 3.2): the logit itself."""
    return logits


@triton.jit
def log_softmax(logits: tl.tensor, log_total: tl.tensor) -> tl.tensor:
    """The log-probability, blind to a head's constant offset."""
    return logits - log_total


@dataclass(frozen=True)
class Score:
    """A function of a head's logits and of the logarithm of their exponentials' sum over all rows.

    One that does not use the sum must not decrease in the logit: only the largest logit over heads
    is kept of a row, and `log_total` is 0.
    """

    function: triton.runtime.KernelInterface
    uses_total: bool


SCORES: dict[str, Score] = {
    "max_logit": Score(max_logit, uses_total=False),
    "log_softmax": Score(log_softmax, uses_total=True),
}
