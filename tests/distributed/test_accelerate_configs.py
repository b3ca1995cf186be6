"""The configurations of `examples/accelerate_configs`: read by Accelerate, and run where a CPU suffices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from tests.helpers import launch

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
SCRIPT = """
import sys
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


ON_CPU = {"ACCELERATE_USE_CPU": "true"}


def parse(config, *options):
    """Read a configuration as `accelerate launch` does."""
    given = ["--config_file", str(CONFIGS / f"{config}.yaml"), *map(str, options), "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(given))[0]


@pytest.mark.parametrize("name", READ)
def test_configuration_is_read_as_intended(name):
    options = parse(name)
    found = {key: str(getattr(options, key)).lower() for key in READ[name]}
    assert found == {key: str(value).lower() for key, value in READ[name].items()}
    assert options.mixed_precision == ("no" if name == "cpu" else "bf16")


def test_there_is_an_expectation_for_every_configuration():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == READ.keys()


def run(tmp_path, processes, environment):
    """Run the script on all ranks, in the environment that `accelerate launch` makes for them."""
    changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    return launch.run_ranks(tmp_path, SCRIPT, processes, [tmp_path / "out"], environment=changed)


def test_cpu_configuration_trains(tmp_path):
    _, environment = prepare_simple_launcher_cmd_env(parse("cpu"))
    (code,), (output,) = run(tmp_path, 1, environment)
    assert code == 0 and "100 examples, 1 processes" in output, output[-3000:]


def test_multi_gpu_configuration_trains_on_two_cpu_processes(tmp_path):
    options = parse("multi_gpu", "--num_processes", 2, "--mixed_precision", "no")
    codes, outputs = run(tmp_path, 2, {**prepare_multi_gpu_env(options), **ON_CPU})
    assert codes == [0, 0] and "100 examples, 2 processes" in outputs[0], outputs[0][-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_accelerate_launch_trains_on_two_machines(tmp_path):
    """The command itself, started twice on this machine."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "multi_node.yaml")]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_ip", "127.0.0.1"]
    command += ["--main_process_port", str(launch.free_port())]
    environment = {**os.environ, **ON_CPU, "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", str(rank), str(script), str(tmp_path / "out")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank, machine in enumerate(machines):
        output, _ = machine.communicate(timeout=300)
        assert machine.returncode == 0, output[-3000:]
        assert ("100 examples, 2 processes" in output) == (rank == 0)  # only the first rank reports


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        ("multi_gpu", {}, "each would train independently"),
        ("fsdp2", ON_CPU, "FSDP is configured, but Accelerate would silently use MULTI_CPU"),
    ],
)
def test_configuration_that_a_cpu_cannot_follow_raises(tmp_path, config, environment, message):
    options = parse(config, "--num_processes", 2, "--mixed_precision", "no")
    codes, outputs = run(tmp_path, 2, {**prepare_multi_gpu_env(options), **environment})
    assert any(codes) and any(message in output for output in outputs), outputs[0][-3000:]
