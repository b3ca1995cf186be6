import os

# Nothing in the tests may reach a hub: what they need is made here or comes from a package.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its precision and devices for the whole process; each test chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def one_thread():
    """For many small trainings, which two threads only slow down, and more so where others compute, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
