import warnings

import pytest

from mm_hf import MultiMix, wrap_model
from tests.helpers import models


@pytest.mark.parametrize(
    ("environment", "distributed", "warns"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, False, True),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, True, False),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False, False),
        ({"WORLD_SIZE": "2"}, False, False),  # of a job whose nodes work on their own
        ({}, False, False),
    ],
)
def test_ranks_that_train_apart_are_reported(monkeypatch, environment, distributed, warns):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mm_hf.distributed.is_distributed", lambda: distributed)
    model = models.build("vit").train()
    with wrap_model(model, MultiMix(num_mixed=5)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(**models.batch("vit"), labels=models.labels()).loss.backward()
    messages = [str(w.message) for w in caught if "each process trains a model of its own" in str(w.message)]
    assert len(messages) == warns and all("started 2 processes" in message for message in messages)
