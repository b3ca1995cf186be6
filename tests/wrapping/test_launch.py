import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from accelerate import DistributedType

from mm_hf import MultiMix, wrap_model
from mm_hf.distributed import check_processes, is_single_process_of_many, warn_if_ranks_train_apart
from tests.helpers import digits, models

VARIABLES = ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
TWO = {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def set_environment(monkeypatch, environment):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "distributed", "warns"),
    [
        (TWO, False, True),
        (TWO, True, False),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False, False),
        ({"WORLD_SIZE": "2"}, False, False),  # of a job whose nodes work on their own
        ({}, False, False),
    ],
)
def test_ranks_that_train_apart_are_reported(monkeypatch, environment, distributed, warns):
    set_environment(monkeypatch, environment)
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


@pytest.mark.parametrize(
    ("environment", "processes", "kind", "message"),
    [
        ({}, 1, "NO", None),
        (TWO, 2, "MULTI_CPU", None),
        (TWO, 2, "DEEPSPEED", None),
        ({"WORLD_SIZE": "2"}, 1, "NO", None),  # of a job whose nodes work on their own
        (TWO, 1, "NO", "2 processes were started, but Accelerate has 1: each would train independently"),
        (TWO, 1, "DEEPSPEED", "for DeepSpeed the backend gloo"),
        (TWO, 2, "NO", "would not average their gradients: each would train independently"),
        ({**TWO, "ACCELERATE_USE_FSDP": "true"}, 2, "FSDP", None),
        ({**TWO, "ACCELERATE_USE_FSDP": "true"}, 2, "MULTI_CPU", "FSDP is configured, .* use MULTI_CPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 1, "NO", "DeepSpeed is configured, .* use NO"),
    ],
)
def test_processes_that_would_not_train_as_configured_are_rejected(monkeypatch, environment, processes, kind, message):
    set_environment(monkeypatch, environment)
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=DistributedType(kind))
    if message is None:
        check_processes(accelerator)
    else:
        with pytest.raises(ValueError, match=message):
            check_processes(accelerator)


def test_trainer_rejects_processes_that_would_train_independently(monkeypatch, tmp_path):
    trainer = digits.run(tmp_path / "out", max_steps=1)
    set_environment(monkeypatch, {"WORLD_SIZE": "3", "LOCAL_RANK": "0"})
    with pytest.raises(ValueError, match="3 processes were started, but Accelerate has 1"):
        trainer.train()


@pytest.mark.distributed
@pytest.mark.parametrize(("options", "alone"), [((), False), (("--num_processes", "2"), True)])
def test_accelerate_launch_that_starts_one_process_of_several_is_noticed(tmp_path, monkeypatch, options, alone):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "script.py"
    script.write_text("import os, json\nprint(json.dumps(dict(os.environ)))")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *options, str(script)]
    output = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    [line] = output.stdout.strip().splitlines()  # one process
    for name, value in json.loads(line).items():
        monkeypatch.setenv(name, value)
    assert is_single_process_of_many() == alone
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_ranks_train_apart()
    assert ["trains alone" in str(warning.message) for warning in caught] == [True] * alone
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")  # started by MPI
    assert not is_single_process_of_many()
