"""Imported before PyTorch, this keeps libraries from telling of kernels that they have not:
transformers imports torchao where it is installed, which does so.

For our command and its processes only: in another program logs are that program's business.
"""

import logging

for _library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)
