"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton
is imported.
"""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The models in the tests are tiny: threads would cost more than they bring, in child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# For `make check`: --hypothesis-profile quick.
settings.register_profile("quick", max_examples=5, deadline=None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
