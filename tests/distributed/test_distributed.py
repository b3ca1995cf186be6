"""`MultiMixTrainer` on two ranks of a CPU (gloo)."""

import pytest

from tests.helpers import launch

SCRIPT = """
import json, sys, torch
from accelerate import PartialState
from tests.helpers import digits
from mm_hf import DenseMultiMix, ManifoldMixup, MultiMixTrainer

drawn = []

class Spy(DenseMultiMix):
    def sample(self, *arguments):
        factors = super().sample(*arguments)
        drawn.append(float(factors.weight[0, 0]))
        return factors

class SpyOnPairs(ManifoldMixup):
    def mix_inputs(self, *arguments):
        mixed = super().mix_inputs(*arguments)
        drawn.append(float(self.block_mixing.share))
        return mixed

mixing = {
    "dense_multimix": Spy(num_mixed=20),
    "dense_multimix, gathered": Spy(num_mixed=20, gather_across_devices=True),
    "manifold_mixup": SpyOnPairs(),
}[sys.argv[2]]
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
torch.distributed.destroy_process_group()  # without it, threads of gloo abort the process now and then
"""


@pytest.mark.parametrize("method", ["dense_multimix", "manifold_mixup"])
def test_ranks_mix_their_own_batches_and_train_one_model(tmp_path, method):
    first, second = launch.launch(tmp_path, SCRIPT, arguments=[method])
    assert first["steps"] == second["steps"] == 3
    assert first["weights"] == second["weights"]
    assert all(a != b for a, b in zip(first["factors"], second["factors"], strict=True))


def test_ranks_mix_their_batches_as_one(tmp_path):
    first, second = launch.launch(tmp_path, SCRIPT, arguments=["dense_multimix, gathered"])
    assert first["weights"] == second["weights"] and first["losses"] == second["losses"]
    assert first["factors"] == second["factors"] and len(set(first["factors"])) == 3
