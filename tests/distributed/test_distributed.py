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


STOP = """
import json, math, sys, torch
from accelerate import PartialState
from tests.helpers import digits
from mm_hf import DenseMultiMix, MultiMixTrainer
from mm_hf.wrapping.finite import NonFiniteLossError

class Overflowing(DenseMultiMix):
    def loss(self, *arguments, **options):
        result = super().loss(*arguments, **options)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 4 and PartialState().process_index == 1:
            result.logs["loss_dense"] = result.logs["loss_dense"] * math.inf
            result.loss = result.loss * math.inf
        return result

directory = sys.argv[1]
options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 100, "num_train_epochs": 4}
arguments = digits.arguments(directory, per_device_train_batch_size=16, ddp_find_unused_parameters=False, **options)
trainer = MultiMixTrainer(digits.vit(), arguments, mixing=Overflowing(num_mixed=5), train_dataset=digits.dataset())
try:
    trainer.train()
except NonFiniteLossError as error:
    result = {"message": str(error), "steps": trainer.state.global_step}
json.dump(result, open(f"{directory}/rank{PartialState().process_index}.json", "w"))
trainer.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
"""


def test_all_ranks_stop_at_a_loss_of_one_rank_that_is_not_finite(tmp_path):
    first, second = launch.launch(tmp_path, STOP)
    assert first == second and first["steps"] == 6  # before the second checkpoint
    assert "step 4 is not finite (loss inf" in first["message"] or "step 5 is not finite" in first["message"]
    assert first["message"].endswith(f"The last checkpoint, {tmp_path / 'checkpoint-3'}, was kept.")
    assert not (tmp_path / "checkpoint-6").exists()
