"""Streamed datasets, workers, uneven last mini-batches and ranks that run out of data, with one and two processes."""

import pytest

from mm_hf import DenseMultiMix, MultiMixTrainer, get_method, wrap_model
from tests.helpers import digits, launch, models

METHODS = ["multimix", "dense_multimix", "mixup", "cutmix", "manifold_mixup", "transmix"]
METHODS += ["zeta_mixup", "regmixup", "align_mixup"]


@pytest.mark.parametrize("name", METHODS)
def test_last_mini_batch_of_one_example_has_the_clean_loss(name):
    model = models.build("vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs, labels = models.batch("vit"), models.labels()
    last = {"pixel_values": inputs["pixel_values"][:1], "labels": labels[:1]}
    clean = model(**last).loss.item()
    model.train()
    handle = wrap_model(model, get_method(name)())
    model(**inputs, labels=labels)
    handle.pop_logs()
    model(**last).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    logs = handle.pop_logs()
    # A single example is mixed with itself only.
    for term in {"loss_clean", "loss_pooled", f"loss_{name}"} & logs.keys():
        assert logs[term] == pytest.approx(clean, rel=1e-5), term
    assert logs.get("mean_largest_factor", 1.0) == 1.0


def test_batch_size_one_raises(tmp_path):
    arguments = digits.arguments(tmp_path, per_device_train_batch_size=1)
    with pytest.raises(
        ValueError, match="per_device_train_batch_size is 1, and DenseMultiMix mixes examples with each other"
    ):
        MultiMixTrainer(digits.vit(), arguments, mixing=DenseMultiMix(), train_dataset=digits.dataset())
    MultiMixTrainer(digits.vit(), arguments, mixing="erm", train_dataset=digits.dataset())


SCRIPT = """
import itertools, json, os, sys
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch.distributed.algorithms.join import Join
from torch.utils.data import DataLoader, IterableDataset
from transformers import default_data_collator

from tests.helpers import digits
from mm_hf import DenseMultiMix, MultiMix, MultiMixTrainer, wrap_model

directory, processes, rank = sys.argv[1], int(sys.argv[2]), int(os.environ.get("RANK", 0))
torch.set_num_threads(1)
train, test = digits.dataset(0, 33), digits.dataset(100, 145)  # 33 = 2 x 16 + 1, and 45

class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows
    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from itertools.islice(self.rows, step[0], None, step[1])

CASES = {
    "examples": ({}, train, test),
    "drop last": ({"dataloader_drop_last": True}, train, test),
    "stream": ({"max_steps": 5}, Stream(train), Stream(test)),
    "stream of datasets": ({"max_steps": 5}, train.to_iterable_dataset(num_shards=3), test.to_iterable_dataset()),
    "stream with workers": (
        {"max_steps": 3, "dataloader_num_workers": 2}, train.to_iterable_dataset(num_shards=2), test
    ),
    "dispatched batches": ({"accelerator_config": {"dispatch_batches": True}}, train, test),
    "gradient accumulation": ({"gradient_accumulation_steps": 2}, train, test),
}
runs = [("own batches", MultiMix(num_mixed=20), case) for case in CASES]
if processes > 1:
    gathered = DenseMultiMix(num_mixed=20, gather_across_devices=True)
    runs += [("gathered", gathered, case) for case in ("examples", "stream")]
results = {}
for how, mixing, case in runs:
    options, rows, held_out = CASES[case]
    GradientState._reset_state()
    arguments = digits.arguments(directory, **{
        "per_device_train_batch_size": 16 // processes, "per_device_eval_batch_size": 16 // processes, **options
    })
    trainer = MultiMixTrainer(digits.vit(), arguments, mixing=mixing, train_dataset=rows, eval_dataset=held_out)
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    output = trainer.predict(held_out)
    results[f"{how}: {case}"] = {
        "steps": trainer.state.global_step,
        "finite": all(torch.tensor(losses).isfinite()) and len(losses) == trainer.state.global_step,
        "weights": float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters())),
        "predicted": len(output.predictions),
        "labels": sorted(output.label_ids.tolist()),
    }

# A custom loop in which ranks run out one by one: 33 examples are 3 mini-batches of 16 for 2 ranks.
def loop(mixing, **wrapping):
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    model = digits.vit().train()
    columns = train.remove_columns("writer")
    loader = DataLoader(columns, batch_size=16, collate_fn=default_data_collator)
    if wrapping:
        rows = [train[i] for i in range(4)]
        batch = default_data_collator([{"pixel_values": r["pixel_values"], "label": r["label"]} for r in rows])
        wrapping = {"example_inputs": batch}
    wrap_model(model, mixing, **wrapping)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
    steps = 0
    with Join([model]):  # accelerator.join_uneven_inputs does this on GPUs only
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return steps

def message(mixing, **wrapping):
    try:
        return loop(mixing, **wrapping)
    except ValueError as error:
        return str(error)

if processes > 1:
    results["joined"] = loop(MultiMix(num_mixed=20), example_inputs=True)
    results["joined, dense"] = loop(DenseMultiMix(num_mixed=20), example_inputs=True)
    results["joined, probed in the forward"] = message(DenseMultiMix(num_mixed=20))
    results["joined, gathered"] = message(MultiMix(num_mixed=20, gather_across_devices=True))
json.dump(results, open(f"{directory}/rank{rank}.json", "w"))
if processes > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_uneven_data_is_trained_and_evaluated_completely(tmp_path, processes):
    results = launch.launch(tmp_path, SCRIPT, processes, [str(processes)])
    truth = [int(label) for label in digits.dataset(100, 145)["label"]]
    # 33 examples are 3 steps of 16, or 2 steps of two accumulated mini-batches. No example is lost or counted twice.
    steps = {"drop last": 2, "stream": 5, "stream of datasets": 5, "gradient accumulation": 2}
    joined = {name: [r.pop(name, None) for r in results] for name in list(results[0]) if name.startswith("joined")}
    for case in results[0]:
        for result in results:
            got = result[case]
            assert got["steps"] == steps.get(case.split(": ")[1], 3), case
            # dataloader_drop_last also applies to the evaluation.
            expected = sorted(truth[:32]) if "drop last" in case else sorted(truth)
            assert got["finite"] and got["predicted"] == len(expected) and got["labels"] == expected, case
        assert len({result[case]["weights"] for result in results}) == 1, case
    if processes == 2:
        assert len(results[0]) == 9
        assert joined["joined"] == joined["joined, dense"] == [2, 1]
        assert all("give wrap_model example_inputs" in text for text in joined["joined, probed in the forward"])
        assert all("gather_across_devices=True needs all ranks" in text for text in joined["joined, gathered"])
