"""With gathered mini-batches, losses and gradients of several ranks equal those of one process with all examples."""

import pytest

from tests.helpers import launch

SCRIPT = '''
import copy, json, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import models
import mm_hf.methods.multimix as multimix
import mm_hf.methods.terms as terms
from mm_hf import DenseMultiMix, MultiMix, wrap_model

dist.init_process_group("gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)

# Numbers that this rank sends in all-gathers and all-reduces outside DDP.
sent = {"gathered": 0, "reduced": 0}
all_gather, all_reduce = dist.all_gather, dist.all_reduce
def counting_gather(parts, x, *args, **kwargs):
    sent["gathered"] += x.numel()
    return all_gather(parts, x, *args, **kwargs)
def counting_reduce(x, *args, **kwargs):
    sent["reduced"] += x.numel()
    return all_reduce(x, *args, **kwargs)
dist.all_gather, dist.all_reduce = counting_gather, counting_reduce

def split(sizes):
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return slice(ends[rank], ends[rank + 1])

def local_part(inputs, labels, mine, trim):
    inputs = {k: v[mine] for k, v in inputs.items()}
    labels = labels[mine]
    if trim and "attention_mask" in inputs:  # each rank pads its own mini-batch
        length = int(inputs["attention_mask"].sum(1).max())
        inputs = {k: v[:, :length] for k, v in inputs.items()}
        labels = labels[:, :length] if labels.ndim == 2 and not labels.is_floating_point() else labels
    return inputs, labels

def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

def distributed_gradients(name, method, steps, seed):
    """Accumulate the loss and gradients of micro-batches with DDP."""
    model = models.build(name, attention_probs_dropout_prob=0.0).train()
    model.apply(lambda m: m.eval() if isinstance(m, torch.nn.Dropout) else None)
    inputs, labels, _ = steps[0]
    handle = wrap_model(model, method, example_inputs={**inputs, "labels": labels})
    parallel = DistributedDataParallel(model)
    losses = []
    torch.manual_seed(seed + 1000 * rank)  # the generators' states differ between ranks, as with dropout
    for k, (inputs, labels, sizes) in enumerate(steps):
        here, own = local_part(inputs, labels, split(sizes), trim=True)
        with torch.enable_grad():
            if k < len(steps) - 1:
                with parallel.no_sync():
                    loss = parallel(**here, labels=own).loss / len(steps)
                    loss.backward()
            else:
                loss = parallel(**here, labels=own).loss / len(steps)
                loss.backward()
        mean = loss.detach().clone()
        all_reduce(mean)
        losses.append(float(mean) / processes)
    return sum(losses), gradients(model)

def single_process_gradients(name, method, steps, seed):
    """Accumulate them in one process with all examples and the same factors."""
    model = models.build(name, attention_probs_dropout_prob=0.0).train()
    model.apply(lambda m: m.eval() if isinstance(m, torch.nn.Dropout) else None)
    inputs, labels, _ = steps[0]
    method = copy.copy(method)
    method.gather_across_devices = False
    wrap_model(model, method, example_inputs={**inputs, "labels": labels})
    torch.manual_seed(seed)
    total = 0.0
    for inputs, labels, _ in steps:
        common = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        multimix.rank_generator = terms.rank_generator = lambda device, common=common: common
        loss = model(**inputs, labels=labels).loss / len(steps)
        loss.backward()
        total += float(loss)
    return total, gradients(model)

def batch(name, b, seed, soft=False, ignored=False):
    labels = models.labels(b, seed=seed)
    if ignored:
        labels[::4] = -100
    if soft:
        labels = torch.nn.functional.one_hot(labels, 5).float() * 0.7 + 0.06
    return models.batch(name, b=b, seed=seed), labels

uneven = [5, 3, 4][:processes]
even = [4] * processes
options = {"num_mixed": 50, "gather_across_devices": True}
def dense(**settings):
    return DenseMultiMix(**options, **settings)

def steps(name, *seeds_and_sizes, **labels):
    return [(*batch(name, sum(sizes), seed, **labels), sizes) for seed, sizes in seeds_and_sizes]

one_example = [1, 7, *even][: processes - 1]
one_example.append(sum(even) - sum(one_example))
few = {"effective_examples": 1.5, "examples_per_mix": 2}
CASES = {
    "vit, all terms": ("vit", dense(pooled_weight=0.5), steps("vit", (1, uneven))),
    "vit, dense factors": ("vit", dense(alpha=0.5), steps("vit", (2, even))),
    "vit, two examples per mix": ("vit", dense(**few), steps("vit", (2, even))),
    "vit, gradient accumulation": ("vit", dense(), steps("vit", (3, even), (4, uneven))),
    "vit, attention not detached": ("vit", dense(detach_attention=False), steps("vit", (5, uneven))),
    "vit, not confidence weighted": ("vit", dense(confidence_weighted=False), steps("vit", (5, uneven))),
    "vit, one example on a rank": ("vit", dense(pooled_weight=1.0), steps("vit", (6, one_example))),
    "vit, soft labels": ("vit", dense(pooled_weight=1.0), steps("vit", (7, uneven), soft=True)),
    "vit, ignored labels": ("vit", dense(pooled_weight=1.0), steps("vit", (8, uneven), ignored=True)),
    "vit, class weights": (
        "vit", dense(pooled_weight=0.5, class_weights=[1, 0, 5, 2, 0.5]), steps("vit", (8, uneven), ignored=True)
    ),
    "bert, sequences of different lengths": ("bert", dense(pooled_weight=0.5), steps("bert", (9, uneven))),
    "multimix": ("bert", MultiMix(**options), steps("bert", (10, uneven))),
}

results = {}
for case, (name, method, micro_batches) in CASES.items():
    draw = multimix.rank_generator
    sent.update(gathered=0, reduced=0)
    loss, grads = distributed_gradients(name, method, micro_batches, seed=3)
    volume = dict(sent)
    expected, expected_grads = single_process_gradients(name, method, micro_batches, seed=3)
    multimix.rank_generator = terms.rank_generator = draw
    assert grads.keys() == expected_grads.keys(), case
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    error = max(float((grads[n] - g).abs().max()) for n, g in expected_grads.items()) / scale
    results[case] = {"loss": loss, "expected": expected, "error": error, "volume": volume}

# All ranks choose the same method for a mini-batch: different choices would deadlock.
torch.manual_seed(rank)
method = DenseMultiMix(input_mixing="mixup_cutmix", input_mixing_prob=0.5, input_mixing_start=0.0, **options)
images = {"pixel_values": torch.zeros(4, 3)}
results["chosen"] = [type(method.for_batch(images, torch.arange(4), epoch=3.0)).__name__ for _ in range(40)]
json.dump(results, open(f"{sys.argv[1]}/rank{rank}.json", "w"))
dist.barrier()
dist.destroy_process_group()
'''


@pytest.mark.parametrize("processes", [2, 3])
def test_gathered_mini_batches_equal_one_process(tmp_path, processes):
    results = launch.launch(tmp_path, SCRIPT, processes)
    chosen = [result.pop("chosen") for result in results]
    assert all(c == chosen[0] for c in chosen) and set(chosen[0]) == {"DenseMultiMix", "CutMix", "Mixup"}
    for result in results:
        for case, got in result.items():
            assert got["loss"] == pytest.approx(got["expected"], rel=1e-5, abs=1e-6), case
            assert got["error"] < 1e-5, (case, got)
    # Gathered: sizes, labels, attention and logits of the largest mini-batch. Reduced: the gradients of all logits.
    b, r, c, total = 4, 16, 5, 4 * processes
    volume = results[0]["vit, dense factors"]["volume"]
    assert volume["gathered"] == 3 + b * (1 + r + r * c)
    assert volume["reduced"] == 3 + total * r * c  # and the fit of the clean examples
