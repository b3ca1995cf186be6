"""The configurations of `examples/accelerate_configs`: all as Accelerate reads them, and those that a CPU can carry out, run."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
SCRIPT = """
import os, sys
sys.path[:0] = os.environ["TEST_PATH"].split(":")
from tests.helpers import loop
loop.run(sys.argv[1], num_train_epochs=1, mixing="multimix")
"""
# What Accelerate makes of each: the launcher, processes, machines, and what shards.
READ = {
    "cpu": {"use_cpu": True, "num_processes": 1, "num_machines": 1, "multi_gpu": False},
    "multi_gpu": {"multi_gpu": True, "num_processes": 8, "num_machines": 1, "use_cpu": False},
    "multi_node": {"multi_gpu": True, "num_processes": 16, "num_machines": 2, "main_process_port": 29500},
    "fsdp2": {"use_fsdp": True, "num_processes": 8, "fsdp_version": 2, "fsdp_reshard_after_forward": "true"},
    "deepspeed_zero2": {"use_deepspeed": True, "num_processes": 8, "zero_stage": 2},
    "deepspeed_zero3": {"use_deepspeed": True, "num_processes": 8, "zero_stage": 3, "zero3_save_16bit_model": True},
}


def test_every_configuration_is_read_as_it_is_meant():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == READ.keys()
    for name, expected in READ.items():
        options = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
        options, _, _ = _validate_launch_command(options)
        found = {key: getattr(options, key) for key in expected}
        assert {k: str(v).lower() for k, v in found.items()} == {k: str(v).lower() for k, v in expected.items()}, name
        assert options.mixed_precision == ("no" if name == "cpu" else "bf16")


def start(tmp_path, config, *options, environment=None):
    """`accelerate launch` of the loop without Trainer; the environment is what a user would have set."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += [*map(str, options), str(script), str(tmp_path / "out")]
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "TEST_PATH": ":".join(sys.path)}
    fixed["HOME"] = str(tmp_path)
    return subprocess.Popen(
        command, env={**fixed, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finished(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_cpu(tmp_path):
    code, output = finished(start(tmp_path, "cpu"))
    assert code == 0 and "100 examples, 1 processes" in output, output[-3000:]


ON_CPU = {"ACCELERATE_USE_CPU": "true"}


def test_multi_gpu_on_two_cpu_processes(tmp_path):
    options = ("--num_processes", 2, "--mixed_precision", "no", "--main_process_port", free_port())
    code, output = finished(start(tmp_path, "multi_gpu", *options, environment=ON_CPU))
    assert code == 0 and "100 examples, 2 processes" in output, output[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_multi_node_on_two_machines_that_are_one(tmp_path):
    options = ("--num_processes", 2, "--mixed_precision", "no", "--main_process_ip", "127.0.0.1")
    options += ("--main_process_port", free_port(), "--machine_rank")
    machines = [start(tmp_path, "multi_node", *options, rank, environment=ON_CPU) for rank in range(2)]
    for rank, (code, output) in enumerate(map(finished, machines)):
        assert code == 0, output[-3000:]
        assert ("100 examples, 2 processes" in output) == (rank == 0)  # the first process tells


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        ("multi_gpu", {}, "2 processes were started, but Accelerate has 1"),
        ("fsdp2", ON_CPU, "FSDP is configured, but Accelerate would silently use MULTI_CPU"),
    ],
)
def test_what_a_cpu_would_train_otherwise_than_asked_is_refused(tmp_path, config, environment, message):
    options = ("--num_processes", 2, "--mixed_precision", "no", "--main_process_port", free_port())
    code, output = finished(start(tmp_path, config, *options, environment=environment))
    assert code != 0 and message in output, output[-3000:]
