"""The device of the tests marked `gpu`: a GPU, or a CPU in a rehearsal (`make gpu REHEARSE=1`)."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    name = os.environ.get("MM_HF_GPU_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU; MM_HF_GPU_TESTS_ON=cpu rehearses the tests on a CPU")
    return torch.device(name)
