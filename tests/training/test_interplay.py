"""Features of Trainer, other trainers, and uses of a trained model, with a mixing method: one real run each."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, EarlyStoppingCallback, ViTImageProcessor, pipeline

from mm_hf import DenseMultiMix, Mixup, MultiMixTrainer, wrap_model
from tests.helpers import digits, models
from tests.helpers.digits import losses, run

DENSE = DenseMultiMix(num_mixed=5, input_mixing="none")
IMAGES = digits.dataset(1000, 1008, extra=False)[:]["pixel_values"]


def trained(directory, **args):
    trainer = run(directory, trainer_args={"mixing": DENSE}, **{"max_steps": 3, **args})
    trainer.train()
    return trainer


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=IMAGES).logits


def test_early_stopping_ends_the_training(tmp_path):
    trainer = run(
        tmp_path,
        trainer_args={"mixing": DENSE, "callbacks": [EarlyStoppingCallback(early_stopping_patience=1)]},
        num_train_epochs=9,
        learning_rate=0.0,  # the evaluation loss does not fall
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.epoch == 2 and trainer.state.best_global_step == 3 and trainer.unmixed is None


def test_each_trial_of_a_search_mixes(tmp_path):
    pytest.importorskip("optuna")
    trainer = MultiMixTrainer(
        args=digits.arguments(tmp_path, max_steps=2, eval_strategy="no"),
        mixing=DENSE,
        model_init=lambda trial: digits.vit(),
        train_dataset=digits.dataset(),
        eval_dataset=digits.dataset(1000, 1040),
    )
    seen = []

    def objective(metrics):
        seen.append((losses(trainer)[0], trainer.unmixed))
        return metrics["eval_loss"]

    rates = {"learning_rate": [1e-4, 1e-2]}
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates["learning_rate"])},
        n_trials=2,
        compute_objective=objective,
    )
    assert len(seen) == 2 and all(loss > 4 and unmixed is None for loss, unmixed in seen)


def test_each_model_of_model_init_mixes(tmp_path):
    """As a search does, which makes a model per trial."""
    trainer = MultiMixTrainer(
        args=digits.arguments(tmp_path, max_steps=2),
        mixing=DENSE,
        model_init=lambda: digits.vit(),
        train_dataset=digits.dataset(),
    )
    for _ in range(2):
        trainer.train()
        assert losses(trainer)[0] > 4 and trainer.unmixed is None  # a clean and a dense term


class RunsOut(DenseMultiMix):
    """Dense MultiMix on a device whose memory is too small for the first batch size."""

    def loss(self, output, labels, **options):
        if len(labels) > 16:
            raise RuntimeError("CUDA out of memory.")
        return super().loss(output, labels, **options)


def test_smaller_batches_of_auto_find_batch_size_mix(tmp_path):
    mixing = RunsOut(num_mixed=5, input_mixing="none")
    trainer = run(tmp_path, trainer_args={"mixing": mixing}, auto_find_batch_size=True, max_steps=3)
    trainer.train()
    assert trainer.state.train_batch_size <= 16 and trainer.unmixed is None
    assert trainer.state.log_history[0]["loss_terms"] == trainer.state.train_batch_size + 16 * 5


def test_noise_on_embeddings_changes_the_training_and_ends_with_it(tmp_path):
    rows = [{"labels": i % 5, **{k: v[i] for k, v in models.batch("bert", b=32).items()}} for i in range(32)]
    results = []
    for noise in (None, 5.0):
        model = models.build("bert", scale=False)
        trainer = run(
            tmp_path, model=model, train=rows, trainer_args={"mixing": DENSE}, max_steps=2, neftune_noise_alpha=noise
        )
        trainer.train()
        results.append(losses(trainer)[0])
        assert not model.get_input_embeddings()._forward_hooks
    assert results[0] != results[1] and all(np.isfinite(results)) and min(results) > 2


def test_trained_model_works_in_a_pipeline(tmp_path):
    images = models.batch("vit", b=8)["pixel_values"]
    rows = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images)]
    trainer = run(tmp_path, model=models.build("vit"), train=rows, trainer_args={"mixing": DENSE}, max_steps=2)
    trainer.train()
    processor = ViTImageProcessor(size={"height": 32, "width": 32})  # mean and standard deviation 0.5
    classify = pipeline("image-classification", model=trainer.model, image_processor=processor, top_k=5)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = {entry["label"]: entry["score"] for entry in classify(Image.fromarray(pixels))}
    inputs = torch.tensor(pixels / 255 * 2 - 1, dtype=torch.float32).movedim(2, 0)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(pixel_values=inputs).logits.softmax(-1)[0]
    for index, label in trainer.model.config.id2label.items():
        assert found[label] == pytest.approx(float(expected[index]), abs=1e-4)


def test_trained_model_can_be_exported(tmp_path):
    model = trained(tmp_path).model.eval()
    exported = torch.export.export(model, (), {"pixel_values": IMAGES}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(pixel_values=IMAGES).logits, logits(model))
    assert "mm_hf" not in str(exported.graph)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trained_model_can_be_exported_to_onnx(tmp_path):
    reference = pytest.importorskip("onnx.reference")

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values=pixel_values).logits

    model = trained(tmp_path).model.eval()
    file = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model), (IMAGES,), str(file), input_names=["pixel_values"], dynamo=False)
    (computed,) = reference.ReferenceEvaluator(str(file)).run(None, {"pixel_values": IMAGES.numpy()})
    torch.testing.assert_close(torch.tensor(computed), logits(model), rtol=1e-5, atol=1e-5)


def test_trained_model_can_be_saved_in_shards(tmp_path):
    trainer = trained(tmp_path)
    trainer.model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(loaded), logits(trainer.model))


def test_dataset_with_a_transform_trains_like_its_columns(tmp_path):
    plain = digits.dataset(0, 64, extra=False)
    raw = plain.with_format(None).rename_column("pixel_values", "image")

    def transform(batch):
        return {"pixel_values": [torch.tensor(x) for x in batch["image"]], "labels": batch["label"]}

    results = []
    for data, options in [(plain, {}), (raw.with_transform(transform), {"remove_unused_columns": False})]:
        trainer = run(tmp_path, train=data, trainer_args={"mixing": Mixup()}, max_steps=3, **options)
        trainer.train()
        results.append(digits.weights(trainer.model))
    digits.same_weights(*results)


def batches():
    rows = digits.dataset(0, 64, extra=False)

    def collate(examples):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in examples]),
            "labels": torch.stack([row["label"] for row in examples]),
        }

    return DataLoader(rows, batch_size=16, collate_fn=collate)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers and log intervals
def test_documented_lightning_module_trains_like_a_loop(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    code = re.search(r"```python\n(import pytorch_lightning.*?)```", page, flags=re.DOTALL)[1]
    recipe = {"__name__": "recipe"}
    exec(compile(code, "migration.md", "exec", dont_inherit=True), recipe)
    classifier = recipe["Classifier"](digits.vit())
    start = copy.deepcopy(classifier.model.state_dict())
    options = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(**options, enable_model_summary=False, default_root_dir=tmp_path)
    torch.manual_seed(0)
    trainer.fit(classifier, batches())
    model = digits.vit()
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    with wrap_model(model, DenseMultiMix()) as handle:
        torch.manual_seed(0)
        for epoch in range(2):
            handle.epoch = epoch
            for batch in batches():
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
    digits.same_weights(digits.weights(classifier.model), digits.weights(model))
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    resumed = recipe["Classifier"](digits.vit(seed=1))
    trainer = pl.Trainer(**options, enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(resumed, batches(), ckpt_path=str(checkpoint))
    digits.same_weights(digits.weights(resumed.model), digits.weights(model))
