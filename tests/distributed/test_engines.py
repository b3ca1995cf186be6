"""`accelerate launch` with the configurations of `examples/accelerate_configs` and the engines that shard a model.

DeepSpeed is not a dependency: see docs/distributed.md.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from tests.helpers import digits, launch

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
GLOO = {"ddp_backend": "gloo", "use_cpu": False}  # DeepSpeed on CPUs
SCRIPT = """
import ast, importlib, os, sys
import torch

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed
    # DeepSpeed would compile shared-memory collectives for one machine; use gloo.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
from mm_hf import MultiMixTrainer
from tests.helpers import digits

torch.set_num_threads(1)
directory, options, checkpoint = sys.argv[1], ast.literal_eval(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
steps = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8}
# The gradients of biases of keys are zero but for rounding, which Adam would scale to steps of the learning rate.
args = digits.arguments(directory, adam_epsilon=1e-3, **steps, **options)
trainer = MultiMixTrainer(model=digits.vit(dropout=0.1), args=args, train_dataset=digits.dataset())
trainer.train(resume_from_checkpoint=checkpoint)
trainer.save_model()
print(trainer.accelerator.distributed_type.value, trainer.accelerator.num_processes)
"""
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
pytestmark = [pytest.mark.distributed]


def accelerate_launch(tmp_path, config, output_dir, options, *checkpoint, **environment):
    """Run the script on two processes with a configuration, and return its exit code and output."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--num_processes=2", "--mixed_precision=no", f"--main_process_port={launch.free_port()}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HOME": str(tmp_path), **environment}
    environment["PYTHONPATH"] = ":".join(sys.path)
    command += list(map(str, [script, output_dir, options, *checkpoint]))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_trains_and_resumes_as_data_parallel_training_does(tmp_path):
    on_cpu = {"ACCELERATE_USE_CPU": "true"}
    code, output = accelerate_launch(tmp_path, "multi_gpu", tmp_path / "ddp", {}, **on_cpu)
    assert code == 0 and output.count("MULTI_CPU 2") == 2, output[-3000:]
    expected = load_file(tmp_path / "ddp" / "model.safetensors")
    for stage in (2, 3):
        directory, resumed = tmp_path / f"zero{stage}", tmp_path / f"resumed{stage}"
        for output_dir, checkpoint in ((directory, []), (resumed, [directory / "checkpoint-2"])):
            code, output = accelerate_launch(tmp_path, f"deepspeed_zero{stage}", output_dir, GLOO, *checkpoint)
            assert code == 0 and output.count("DEEPSPEED 2") == 2, output[-3000:]
            digits.same_weights(load_file(output_dir / "model.safetensors"), expected, rtol=1e-5, atol=1e-5)
            assert AutoModelForImageClassification.from_pretrained(output_dir).vit is not None
        assert (resumed / "checkpoint-3").is_dir() and not (resumed / "checkpoint-2").exists()


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"use_cpu": False}, {}, "2 processes were started, but Accelerate has 1: each would train independently"),
        ({}, {"ACCELERATE_USE_CPU": "true"}, "DeepSpeed is configured, but Accelerate would silently use MULTI_CPU"),
    ],
)
def test_deepspeed_that_accelerate_ignores_is_reported(tmp_path, options, environment, message):
    code, output = accelerate_launch(tmp_path, "deepspeed_zero2", tmp_path / "out", options, **environment)
    assert code != 0 and message in output, output[-3000:]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("fsdp2", {}, "FSDP is configured, but Accelerate would silently use MULTI_CPU"),
        ("multi_gpu", GLOO, "would not average their gradients: each would train independently"),
    ],
)
def test_launch_on_cpus_whose_processes_would_train_apart_is_reported(tmp_path, config, options, message):
    code, output = accelerate_launch(tmp_path, config, tmp_path / "out", options)
    assert code != 0 and message in output, output[-3000:]
    assert not list((tmp_path / "out").glob("*"))
