"""Trainer runs in evaluation, bfloat16, gradient checkpointing, compilation and LoRA equal those without."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from mm_hf import DenseMultiMix, MultiMixTrainer
from tests.helpers import digits
from tests.helpers.digits import losses, run

DENSE = DenseMultiMix(num_mixed=20)
# Older versions of Transformers use the older name of the argument.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# ---- evaluation ----


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_evaluation_and_prediction_equal_plain_trainer_bit_for_bit(tmp_path, smoothing):
    results = []
    for trainer_class, extra in [(Trainer, {}), (MultiMixTrainer, {"mixing": DENSE})]:
        trainer = run(
            tmp_path,
            trainer_class,
            digits.vit(dropout=0.1),
            trainer_args={**extra, "compute_metrics": accuracy},
            label_smoothing_factor=smoothing,
            per_device_eval_batch_size=16,
        )
        evaluation = trainer.evaluate()
        prediction = trainer.predict(digits.dataset(1000, 1040))
        results.append((evaluation["eval_loss"], evaluation["eval_accuracy"], prediction))
    assert results[0][:2] == results[1][:2]
    assert np.array_equal(results[0][2].predictions, results[1][2].predictions)
    assert np.array_equal(results[0][2].label_ids, results[1][2].label_ids)
    assert results[0][2].metrics["test_loss"] == results[1][2].metrics["test_loss"]


def test_evaluation_after_training_runs_the_original_forward(tmp_path):
    trainer = run(tmp_path, trainer_args={"mixing": DENSE}, bf16=True, max_steps=2)
    trainer.train()
    plain = run(tmp_path, Trainer, digits.vit(), bf16=True, learning_rate=0.0, max_steps=1)
    plain.train()
    plain.model.load_state_dict(trainer.model.state_dict())
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_columns_that_the_model_ignores_are_dropped(tmp_path):
    columns = []

    def collate(examples):
        columns.append(sorted(examples[0]))
        return {k: torch.stack([torch.as_tensor(e[k]) for e in examples]) for k in ("pixel_values",)} | {
            "labels": torch.stack([e["label"] for e in examples])
        }

    trainer = run(tmp_path, trainer_args={"mixing": DENSE, "data_collator": collate}, max_steps=1)
    trainer.train()
    assert columns[0] == ["label", "pixel_values"]
    assert trainer._signature_columns[:2] == ["pixel_values", "labels"]


# ---- modes ----


def test_training_in_bfloat16_reduces_the_loss(tmp_path):
    trainer = run(tmp_path, trainer_args={"mixing": DENSE}, bf16=True, num_train_epochs=40, learning_rate=3e-3)
    trainer.train()
    assert np.mean(losses(trainer)[-3:]) < 0.8 * losses(trainer)[0]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_weights(tmp_path, reentrant):
    results = []
    for extra in (
        {},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}},
    ):
        trainer = run(tmp_path, model=digits.vit(), trainer_args={"mixing": DENSE}, max_steps=3, **extra)
        trainer.train()
        results.append(digits.weights(trainer.model))
    digits.same_weights(*results, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_rejects_attention_with_gradient(tmp_path):
    mixing = DenseMultiMix(num_mixed=5, detach_attention=False)
    trainer = run(tmp_path, trainer_args={"mixing": mixing}, **{CHECKPOINTING: True})
    with pytest.raises(ValueError, match="detach_attention=False does not work with gradient checkpointing"):
        trainer.train()


def test_torch_compile_gives_the_same_training(tmp_path):
    results = []
    for extra in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = run(tmp_path, model=digits.vit(), trainer_args={"mixing": DENSE}, max_steps=3, **extra)
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        results.append((digits.weights(trainer.model), losses(trainer)))
    digits.same_weights(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-3)


def test_lora_trains_adapters_only(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(digits.vit(), config)
    frozen = model.base_model.model.vit.layers[0].mlp.fc1.weight.detach().clone()
    trainer = run(
        tmp_path,
        model=model,
        trainer_args={"mixing": DENSE},
        num_train_epochs=8,
        learning_rate=1e-2,
        save_strategy="epoch",
        remove_unused_columns=True,
        label_names=["labels"],
    )
    trainer.train()
    assert np.mean(losses(trainer)[-3:]) < losses(trainer)[0]
    assert torch.equal(frozen, model.base_model.model.vit.layers[0].mlp.fc1.weight)
    images = digits.dataset(1000, 1010)[:]["pixel_values"]
    loaded = peft.PeftModel.from_pretrained(digits.vit(), Path(tmp_path) / "checkpoint-24").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values=images).logits, model.eval()(pixel_values=images).logits)
