"""Imported before transformers, this keeps libraries from telling of kernels that they have
not: transformers imports torchao where it is installed, which does so.

For our command, its processes and the benchmarks: in another program logs are its own business.
"""

import logging

for _library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)
