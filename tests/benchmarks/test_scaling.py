"""Tests of the formulas of docs/scaling.md against the code on the meta device, and of the page's tables."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks.markdown import table_lines
from mm_hf import ERM, DenseMultiMix, wrap_model
from tests.helpers import digits, models

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.mark.parametrize(
    ("b", "r", "c", "n", "logit", "processes"),
    [
        (32, 8, 1000, 500, 4, 1),
        (128, 3, 21_841, 100, 2, 1),
        (64, 49, 10, 300, 2, 1),
        (16, 64, 2000, 40, 2, 4),
        (4, 16, 1000, 1024, 2, 1024),
    ],
)
def test_formulas_agree_with_the_code(b, r, c, n, logit, processes):
    found = scaling.count_on_meta_device(b, r, c, n, logit, processes)
    assert found["operations"] == scaling.products(b, r, c, n)
    assert found["bytes"] == pytest.approx(scaling.memory(b, r, c, n, logit, processes), rel=0.2)
    if processes == 1:
        assert found["launches"] == pytest.approx(scaling.kernel_launches(b, r, c, n), rel=0.1)


@pytest.mark.parametrize(
    ("b", "c", "n", "most"), [(128, 1000, 1000, 240), (32, 10, 100, 90)], ids=["six chunks", "one chunk"]
)
def test_mixing_launches_few_kernels_per_step(monkeypatch, b, c, n, most):
    """Sizes of ViT-B/16: counted for a complete step on the meta device, minus a plain step of the same model."""
    monkeypatch.setattr("mm_hf.functional.devices.chunk_elements", lambda device: 1 << 25)  # an accelerator's
    for module in ("multimix", "terms"):  # the meta device has none
        monkeypatch.setattr(f"mm_hf.methods.{module}.rank_generator", lambda device: None)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())
    r, launches = 196, []
    for mixes in (True, False):
        model = models.build("vit", image_size=28, patch_size=2, num_labels=c).train()
        example = {**models.batch("vit", b=4, side=28), "labels": models.labels(4)}
        with wrap_model(model, DenseMultiMix(num_mixed=n) if mixes else ERM(), example_inputs=example) as handle:
            assert not mixes or (handle.plan.prefix == 1 and r == 14**2)
            model.to("meta")
            with torch.device("meta"), scaling.MemoryCounter() as counter:
                labels = torch.empty(b, dtype=torch.long)
                model(pixel_values=torch.empty(b, 3, 28, 28), labels=labels).loss.backward()
        launches.append(counter.launches)
    assert launches[0] - launches[1] <= most, launches


def test_page_shows_the_checked_values():
    page = scaling.PAGE.read_text()
    for make in (scaling.models, scaling.num_mixed, scaling.step, scaling.gather, scaling.checks):
        table = "\n".join(table_lines(make(), align="l"))
        assert f"<!-- begin: {make.__name__} -->\n\n{table}\n" in page, "run python -m benchmarks.scaling"
    rows = scaling.harness.read("scaling.csv")
    assert {row["sizes"].split(", ")[-1] for row in rows if row["how"].startswith("measured")} == {
        "1 process",
        "2 processes",
        "3 processes",
    }
    for row in rows:
        exact = row["what"].startswith(("operations", "numbers"))
        assert int(row["code"]) == pytest.approx(int(row["formula"]), rel=0 if exact else 0.2), row


@pytest.mark.parametrize("name", ["imagenet21k_vit_base", "imagenet21k_vit_giant"])
def test_recipes_for_21841_classes_train(tmp_path, name):
    """The script parses the recipe, and a small model with as many classes trains a step with its method."""
    from run_image_classification import parse_arguments

    text = (RECIPES / f"{name}.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text + "use_cpu: true\n")
    model_args, data_args, training_args, mixing = parse_arguments([str(tmp_path / "recipe.yaml")])
    assert mixing == DenseMultiMix(num_mixed=100) and training_args.save_total_limit == 2
    sizes = dict(part.split("=") for part in model_args.config_overrides.split(","))
    model = scaling.MODELS[{"base": "ViT-B/16", "giant": "ViT-g/14"}[name.split("_")[-1]]]
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
    assert tuple(int(sizes.get(key, 16)) for key in keys) == model
    # The numbers in the comments of the recipe.
    b, r = training_args.per_device_train_batch_size, (224 // model[-1]) ** 2
    assert f"the loss needs {scaling.memory(b, r, 21_841, 100) / 1e9:.1f} GB" in text
    gathered = re.search(r"true would need (\d+) GB on each of (\d+) GPUs", text)
    if gathered:
        assert int(gathered[1]) == round(scaling.memory(b, r, 21_841, 100, 2, int(gathered[2])) / 1e9)
    small = digits.vit(num_labels=21_841).train()
    rows = digits.dataset(0, 4, extra=False)[:]
    inputs = {"pixel_values": rows["pixel_values"], "labels": rows["label"] + 21_831}
    with wrap_model(small, mixing):
        loss = small(**inputs).loss
        loss.backward()
    assert loss.isfinite() and small.classifier.weight.grad.any()
    assert data_args.train_dir == "/data/imagenet21k"
