"""FSDP2 on two CPU processes: losses, gradients and checkpoints equal those of DDP."""

import pytest
from transformers import AutoModelForImageClassification

from tests.helpers import launch

SCRIPT = """
import copy, json, sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import models
from mm_hf import DenseMultiMix, ManifoldMixup, MultiMix, wrap_model

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
torch.set_num_threads(1)
mine = slice(4 * rank, 4 * rank + 4)

def fresh(name, **changes):
    model = models.build(name, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes).train()
    inputs, labels = models.batch(name, b=8, seed=1), models.labels(8, seed=1)
    return model, {**{k: v[mine] for k, v in inputs.items()}, "labels": labels[mine]}

def shard(model, head=False, **policy):
    for layer in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        fully_shard(layer, mesh=mesh, **policy)
    if head:
        fully_shard(model.classifier, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)

def step(model, call, batch, seed=5):
    torch.manual_seed(seed)
    loss = call(**batch).loss
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(mean) / 2, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}

options = {"num_mixed": 50}
CASES = {
    "vit": ("vit", DenseMultiMix(**options), {}),
    "vit, head sharded separately": ("vit", DenseMultiMix(**options), {"head": True}),
    "vit, gathered": ("vit", DenseMultiMix(pooled_weight=1.0, gather_across_devices=True, **options), {}),
    "bert, pooler in the root": ("bert", DenseMultiMix(**options), {}),
    "multimix": ("bert", MultiMix(**options), {}),
    "manifold mixup": ("vit", ManifoldMixup(), {}),
}
results = {}
for case, (name, method, how) in CASES.items():
    model, batch = fresh(name)
    handle = wrap_model(model, method)
    loss, grads = step(model, DistributedDataParallel(model, find_unused_parameters=True), batch)
    sharded, batch = fresh(name)
    wrap_model(sharded, method)
    shard(sharded, **how)
    before = {n: p for n, p in sharded.named_parameters()}
    sharded_loss, sharded_grads = step(sharded, sharded, batch)
    # Probing does not change the model: its parameters stay sharded, and the next step has the same loss.
    sharded.zero_grad()
    again, _ = step(sharded, sharded, batch)
    sharded.reshard() if hasattr(sharded, "reshard") else None
    still_sharded = all(isinstance(p, DTensor) for p in sharded.parameters())
    assert grads.keys() == sharded_grads.keys(), case
    scale = max(float(g.abs().max()) for g in grads.values())
    error = max(float((sharded_grads[n] - g).abs().max()) for n, g in grads.items()) / scale
    results[case] = {"loss": loss, "sharded": sharded_loss, "again": again, "error": error}
    results[case]["sharded after"] = still_sharded

# The gathered state dict is saved as a plain model.
state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    sharded.save_pretrained(sys.argv[1], state_dict=state)
    results["saved"] = all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())

# With bfloat16 mixed precision of FSDP; `prepare` probes the model before its first forward, as Trainer does.
model, batch = fresh("bert")
handle = wrap_model(model, DenseMultiMix(**options))
shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
handle.prepare(batch)
results["bf16"], _ = step(model, model, batch)
model, batch = fresh("vit")
wrap_model(model, DenseMultiMix(**options))
shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
results["bf16, probed in the forward"], _ = step(model, model, batch)

# In late epochs some mini-batches are mixed in input space, where the head runs only once: on all ranks or on none.
model, batch = fresh("vit")
handle = wrap_model(model, DenseMultiMix(**options))
shard(model, head=True)
handle.epoch = 1000.0
torch.manual_seed(rank)
results["chosen"] = []
for _ in range(12):
    model(**batch).loss.backward()
    results["chosen"].append("loss_cutmix" in handle.pop_logs())
json.dump(results, open(f"{sys.argv[1]}/rank{rank}.json", "w"))
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_models_have_the_losses_and_gradients_of_unsharded_models(tmp_path):
    first, second = launch.launch(tmp_path, SCRIPT)
    assert first.pop("saved")
    chosen = first.pop("chosen")
    assert second.pop("chosen") == chosen and 0 < sum(chosen) < 12
    for result in (first, second):
        bf16 = {"bert, pooler in the root": result.pop("bf16"), "vit": result.pop("bf16, probed in the forward")}
        for case, got in result.items():
            assert got["sharded"] == pytest.approx(got["loss"], rel=1e-6), case
            assert got["again"] == got["sharded"] and got["sharded after"], case
            assert got["error"] < 1e-6, (case, got)
        for case, loss in bf16.items():
            assert loss == pytest.approx(result[case]["loss"], rel=0.05)
    _, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
