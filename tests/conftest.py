"""Set-up shared by all tests."""

import os

import pytest
import torch

from trocr_fast import _csrc

# Before any kernel module is imported: without a GPU, Triton's interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The models of the tests are small: more threads cost more than they bring, a hundredfold on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif item.get_closest_marker("gpu") and "csrc" in item.path.parts and _csrc.BUILD == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs the extension built with nvcc (TROCR_FAST_CUDA=1)"))
