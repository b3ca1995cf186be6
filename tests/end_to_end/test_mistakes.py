"""The statements of docs/mistakes.md, tested on the code of that page."""

import json
import warnings
from pathlib import Path

import blocks
import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from torch import nn
from transformers import AutoModelForImageClassification

from tests.helpers import digits, launch

# The page describes this version, in which `loss_is_scaled_for_ga` is new.
pytestmark = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="needs Transformers 5.23")
PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
CODE = {}
for _ in blocks.run(PAGE.read_text(), str(PAGE), CODE):
    pass
RIGHT = [CODE["RightMixupTrainer"], CODE["mixup_trainer"]]


def make(trainer, directory, model=None, train=None, **changes):
    changes = {"max_steps": 2, **changes}
    model = digits.vit() if model is None else model
    data = digits.dataset(0, 64) if train is None else train
    return trainer(
        model, digits.arguments(directory, **changes), train_dataset=data, eval_dataset=digits.dataset(64, 128)
    )


def logged(trainer, name):
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_mixup_trainer_mixes_in_evaluation(tmp_path):
    wrong = make(CODE["MixupTrainer"], tmp_path)
    plain = make(CODE["Trainer"], tmp_path).evaluate()["eval_loss"]
    first, second = (wrong.evaluate()["eval_loss"] for _ in range(2))
    assert first != second and plain not in (first, second)
    for right in RIGHT:
        assert make(right, tmp_path).evaluate()["eval_loss"] == plain


def test_accumulated_gradients_are_too_large(tmp_path, monkeypatch):
    def norm(trainer, **how):
        return logged(make(trainer, tmp_path, max_steps=1, max_grad_norm=1e9, train=data, **how), "grad_norm")[0]

    row = digits.dataset(0, 1)[0]
    data = [
        {"pixel_values": row["pixel_values"], "labels": int(row["label"])}
    ] * 32  # the same example: mixing changes nothing
    whole, parts = (
        {"per_device_train_batch_size": 32},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
    )
    assert norm(CODE["MixupTrainer"], **parts) == pytest.approx(4 * norm(CODE["MixupTrainer"], **whole), rel=1e-3)
    for right in RIGHT:
        assert norm(right, **parts) == pytest.approx(norm(right, **whole), rel=1e-3)


def test_soft_labels_turn_classes_into_a_multi_label_problem(tmp_path):
    wrong = make(CODE["SoftLabelTrainer"], tmp_path)
    wrong.train()
    wrong.save_model(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    with pytest.raises(ValueError, match="size"):
        wrong.evaluate()
    for right in RIGHT:
        trainer = make(right, tmp_path)
        trainer.train()
        assert trainer.model.config.problem_type != "multi_label_classification"
        trainer.evaluate()


def test_label_smoothing_is_ignored_or_raises(tmp_path):
    def loss(trainer, factor):
        return logged(make(trainer, tmp_path, label_smoothing_factor=factor), "loss")[0]

    assert loss(CODE["MixupTrainer"], 0.5) == loss(CODE["MixupTrainer"], 0.0)
    with pytest.raises((RuntimeError, IndexError)):
        loss(CODE["SoftLabelTrainer"], 0.5)
    for right in RIGHT:
        assert loss(right, 0.5) != loss(right, 0.0)


def test_private_generator_is_not_in_the_checkpoint(tmp_path):
    def shares(trainer, directory, draws, resume=None):
        trainer = make(trainer, directory, max_steps=6, save_strategy="steps", save_steps=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Spy(trainer.model) as spy:
                trainer.train(resume_from_checkpoint=resume)
        draws.extend(spy.seen)
        return draws

    class Spy:
        """Record the sum of the pixels that enter the model in each step."""

        def __init__(self, model):
            self.model, self.seen = model, []

        def __enter__(self):
            self.hook = self.model.vit.register_forward_pre_hook(
                lambda module, args, kwargs: self.seen.append(
                    round(float((args[0] if args else kwargs["pixel_values"]).std()), 6)
                ),
                with_kwargs=True,
            )
            return self

        def __exit__(self, *_):
            self.hook.remove()

    for name, same in [("SeededMixupTrainer", False), ("RightMixupTrainer", True)]:
        straight = shares(CODE[name], tmp_path / name, [])
        resumed = shares(CODE[name], tmp_path / name, [], str(tmp_path / name / "checkpoint-3"))
        assert (resumed == straight[3:]) == same
    fresh = CODE["SeededMixupTrainer"](digits.vit(), digits.arguments(tmp_path)).generator
    assert fresh.beta(1.0, 1.0) == np.random.default_rng(7).beta(1.0, 1.0)


SCRIPT = f"""
import json, sys
import blocks, numpy as np, torch
from accelerate import PartialState
from tests.helpers import digits
from torch.nn import functional as F

CODE = {{}}
for _ in blocks.run(open({str(PAGE)!r}).read(), "mistakes.md", CODE):
    pass
drawn = []
beta = np.random.beta
np.random.beta = lambda *a: drawn.append(beta(*a)) or drawn[-1]

def train(trainer, **changes):
    drawn.clear()
    arguments = digits.arguments(sys.argv[1], max_steps=3, per_device_train_batch_size=16, **changes)
    trainer = trainer(digits.vit(), arguments, train_dataset=digits.dataset())
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    return float(sum(p.detach().double().abs().sum() for p in trainer.model.parameters()))

class HiddenStateTrainer(CODE["Trainer"]):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
        return F.cross_entropy(self.accelerator.unwrap_model(model).classifier(hidden[:, 0]), inputs["labels"])

result = {{"mixup": train(CODE["MixupTrainer"]), "drawn": list(drawn)}}
result["around"] = train(CODE["FeatureMixupTrainer"])
torch.rand = lambda *a, rand=torch.rand, **k: drawn.append(float(rand(*a, **k))) or torch.tensor(drawn[-1])
result["right"], result["rightly drawn"] = train(CODE["RightMixupTrainer"]), list(drawn)
try:
    train(HiddenStateTrainer, ddp_find_unused_parameters=False)
except RuntimeError as error:
    result["error"] = str(error)
json.dump(result, open(f"{{sys.argv[1]}}/rank{{PartialState().process_index}}.json", "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_mistakes_on_several_ranks(tmp_path):
    first, second = launch.launch(tmp_path, SCRIPT)
    assert first["drawn"] == second["drawn"] and len(first["drawn"]) == 3
    assert first["mixup"] == second["mixup"]
    assert first["around"] != second["around"]
    assert first["right"] == second["right"]
    assert len(first["rightly drawn"]) == 3 and set(first["rightly drawn"]).isdisjoint(second["rightly drawn"])
    assert "finished reduction in the prior iteration" in first["error"]


def test_unused_columns_are_removed_before_the_transform(tmp_path):
    images = Dataset.from_dict({"image": np.zeros((8, 8, 8)).tolist(), "label": list(range(8))}).with_transform(
        CODE["transform"]
    )
    with pytest.raises(KeyError, match="image"):
        make(CODE["Trainer"], tmp_path, train=images).train()
    make(CODE["Trainer"], tmp_path, train=images, remove_unused_columns=False).train()

    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = digits.vit()

        def forward(self, **inputs):
            given.update(inputs)
            raise InterruptedError

    given = {}
    with pytest.raises(InterruptedError):
        make(CODE["Trainer"], tmp_path, model=Anything()).train()
    assert "labels" in given and "pixel_values" not in given


def test_checkpoint_of_a_wrapper_module_does_not_load(tmp_path):
    trainer = make(CODE["Trainer"], tmp_path, model=CODE["MixupModel"](digits.vit()))
    trainer.train()
    trainer.save_model(tmp_path / "model")
    with pytest.raises((OSError, ValueError)):
        AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    trainer.model.model.config.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert not torch.equal(loaded.classifier.weight, trainer.model.model.classifier.weight)
    trainer.model.model.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert torch.equal(loaded.classifier.weight, trainer.model.model.classifier.weight)
