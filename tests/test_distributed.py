"""Two real processes on the CPU (gloo), started by torchrun."""

import json
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, torch
from accelerate import PartialState
import digits
from mm_hf import DenseMultiMix, ManifoldMixup, MultiMixTrainer

drawn = []

class Spy(DenseMultiMix):
    def sample(self, num_examples, device):
        factors = super().sample(num_examples, device)
        drawn.append(float(factors.weight[0, 0]))
        return factors

class SpyOnPairs(ManifoldMixup):
    def mix_inputs(self, *arguments):
        mixed = super().mix_inputs(*arguments)
        drawn.append(float(self.block_mixing.share))
        return mixed

mixing = Spy(num_mixed=20) if sys.argv[2] == "dense_multimix" else SpyOnPairs()
arguments = digits.arguments(sys.argv[1], per_device_train_batch_size=16, ddp_find_unused_parameters=False)
trainer = MultiMixTrainer(digits.vit(), arguments, mixing=mixing, train_dataset=digits.dataset())
trainer.train()
assert trainer.accelerator.num_processes == 2
result = {
    "weights": float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters())),
    "factors": drawn,
    "steps": trainer.state.global_step,
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
}
json.dump(result, open(f"{sys.argv[1]}/rank{PartialState().process_index}.json", "w"))
trainer.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()  # gloo's threads abort a process that leaves without it, now and then
"""


@pytest.mark.parametrize("method", ["dense_multimix", "manifold_mixup"])
def test_two_processes_mix_their_own_batches_and_train_one_model(tmp_path, method):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += ["--master_addr=127.0.0.1", f"--master_port={free.getsockname()[1]}"]
    environment = {
        "PYTHONPATH": ":".join(sys.path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path), method],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["steps"] == second["steps"] == 3
    assert first["weights"] == second["weights"]
    assert all(a != b for a, b in zip(first["factors"], second["factors"], strict=True))
