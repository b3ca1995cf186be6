import warnings

import pytest

from mm_hf import MultiMix, wrap_model
from mm_hf.distributed import warn_if_ranks_train_apart
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_ranks_train_apart()
    assert len(caught) == warns and all("started 2 processes" in str(warning.message) for warning in caught)


def test_first_training_step_reports_ranks_that_train_apart(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    model = models.build("vit").train()
    with wrap_model(model, MultiMix(num_mixed=5)):
        with pytest.warns(UserWarning, match="started 4 processes, .* each process trains a model of its own"):
            model(**models.batch("vit"), labels=models.labels()).loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**models.batch("vit"), labels=models.labels()).loss.backward()
