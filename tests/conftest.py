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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine that the client of this process asks, without a login."""
    import huggingface_hub
    import transformers
    from huggingface_hub import constants

    from tests.helpers.hub_server import HubServer
    from tests.helpers.pushing import TOKENS

    with HubServer(TOKENS) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nobody-logged-in"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(
            "mm_hf.training.model_card._picture", lambda *_: None
        )  # seconds; drawn in test_hub.py and test_card.py
        yield server
