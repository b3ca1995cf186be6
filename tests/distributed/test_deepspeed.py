"""ZeRO-2 and ZeRO-3 on two CPU processes; needs DeepSpeed (see docs/distributed.md)."""

import importlib.util

import pytest

from tests.helpers import launch

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
import deepspeed

# DeepSpeed would compile shared-memory collectives for one machine; use gloo.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
from tests.helpers import models
from mm_hf import DenseMultiMix, ManifoldMixup, MultiMix, wrap_model

deepspeed.init_distributed(dist_backend="gloo")
assert dist.get_world_size() == 2
rank = dist.get_rank()
torch.set_num_threads(1)
mine = slice(4 * rank, 4 * rank + 4)

def losses(stage, name, method):
    model = models.build(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    inputs, labels = models.batch(name, b=8, seed=1), models.labels(8, seed=1)
    batch = {**{k: v[mine] for k, v in inputs.items()}, "labels": labels[mine]}
    wrap_model(model, method)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    torch.manual_seed(5)
    found = []
    for _ in range(3):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found

CASES = {
    "vit": ("vit", DenseMultiMix(num_mixed=50)),
    "bert": ("bert", DenseMultiMix(num_mixed=50)),
    "vit, gathered": ("vit", DenseMultiMix(num_mixed=50, gather_across_devices=True)),
    "manifold mixup": ("vit", ManifoldMixup()),
}
results = {case: [losses(stage, *how) for stage in (0, 2, 3)] for case, how in CASES.items()}
json.dump(results, open(f"{sys.argv[1]}/rank{rank}.json", "w"))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_sharding_does_not_change_the_loss(tmp_path):
    for result in launch.launch(tmp_path, SCRIPT, environment={"DS_ACCELERATOR": "cpu"}):
        for case, (unsharded, *sharded) in result.items():
            assert unsharded[2] < unsharded[0], case
            for losses in sharded:
                assert losses == pytest.approx(unsharded, rel=1e-5), case
