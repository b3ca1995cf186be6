import gc
import json
import os
import sys
from pathlib import Path

# No test may reach the Hub: its files are made here or come from a package.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread for this process and for all that it starts: pytest-xdist runs one worker per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")
torch.set_num_threads(1)

TESTS = Path(__file__).parent
MARKED_DIRECTORIES = {"browser", "distributed", "end_to_end", "gpu"}
# Complete trainings, pushes and comparisons in other directories. `make test-fast` leaves them out.
END_TO_END = {
    "cli/test_train.py",
    "comparison/test_runs.py",
    "fuzz/test_fuzz.py",
    "training/test_hub.py",
    "training/test_push.py",
    "training/test_streaming.py",
}
WORDS = ["good", "bad", "fine", "poor", "film", "book", "very", "not"]  # of the fixture `reviews`


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by mark
def pytest_collection_modifyitems(items):
    """Mark all tests of a directory with the directory's name, and complete runs with `end_to_end`."""
    for item in items:
        room = item.path.relative_to(TESTS).parts[0] if item.path.is_relative_to(TESTS) else ""
        if room in MARKED_DIRECTORIES:
            item.add_marker(room)
        elif room and (str(item.path.relative_to(TESTS)) in END_TO_END or "compile" in item.name):  # compiling is slow
            item.add_marker("end_to_end")


@pytest.fixture(autouse=True, scope="module")
def frozen_modules():
    """Exclude what was imported so far from garbage collection, which each training of Trainer runs several times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_registered_heads(monkeypatch):
    """Let no test see the heads that another one, or the example of a docstring, has registered."""
    if "mm_hf.locations.registry" in sys.modules:
        monkeypatch.setattr(sys.modules["mm_hf.locations.registry"], "_registered", {})


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Reset Accelerate's state, which would keep the precision and devices of one test for the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Start a Hub on the loopback interface that this process's client uses, without a login."""
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
        # Drawing takes seconds; test_hub.py and test_model_card.py test it.
        monkeypatch.setattr("mm_hf.training.model_card._plot_training", lambda *_: None)
        yield server


@pytest.fixture
def reviews(tmp_path):
    """Return a directory of sentences whose class depends on one word, and the directory of a tiny BERT for them."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

    rows = [
        {"text": f"{adverb} {word} {noun}", "sentiment": "up" if word in ("good", "fine") else "down", "id": i}
        for i, (adverb, word, noun) in enumerate(
            (a, w, n) for _ in range(4) for a in ("very", "not") for w in WORDS[:4] for n in ("film", "book")
        )
    ]
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, part in {"train": rows, "validation": rows[::3], "test": rows[1::3]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=16)
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("bert", vocab_size=13, max_position_embeddings=16, num_labels=2, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    return folder, tmp_path / "bert"
