"""Loss terms and attention maps in trackers, and training that the maps do not affect."""

import json
import random
import sqlite3
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, ViTImageProcessorPil, integrations

from mm_hf import ERM, AttentionMapCallback, DenseMultiMix, MultiMixTrainer, extract
from mm_hf.evaluation.plots import plot_image_attention, plot_token_attention
from tests.helpers import digits, models

TERMS = {"loss", "loss_clean", "loss_dense", "loss_terms", "mean_largest_factor", "attention_entropy"}


def trainer(directory, mixing=None, dropout=0.0, **changes):
    data = digits.dataset(0, 64)
    return MultiMixTrainer(
        digits.vit(dropout=dropout),
        digits.arguments(directory, **changes),
        mixing=mixing or DenseMultiMix(num_mixed=20),
        train_dataset=data,
        eval_dataset=digits.dataset(64, 96),
    )


def test_loss_terms_and_attention_maps_are_logged_to_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    this = trainer(tmp_path, report_to="tensorboard", num_train_epochs=2)
    this.add_callback(AttentionMapCallback(this, this.eval_dataset, every=3, max_examples=2))
    this.train()
    this.evaluate()
    (directory,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = event_accumulator.EventAccumulator(str(directory), size_guidance={"images": 0}).Reload()
    logged = {key: value for entry in this.state.log_history if "loss" in entry for key, value in entry.items()}
    assert set(logged) >= TERMS
    for name in TERMS:
        scalars = events.Scalars(f"train/{name}")
        assert [event.step for event in scalars] == [1, 2, 3, 4]
        assert scalars[-1].value == pytest.approx(logged[name])
    total = [events.Scalars(f"train/loss_{name}")[1].value for name in ("clean", "dense")]
    assert sum(total) == pytest.approx(events.Scalars("train/loss")[1].value, abs=1e-3)
    maps = events.Images("attention_map")
    assert [event.step for event in maps] == [0, 3, 4]
    assert (maps[0].width, maps[0].height) == (maps[1].width, maps[1].height)
    assert maps[0].encoded_image_string != maps[2].encoded_image_string


def test_loss_terms_and_attention_maps_are_logged_to_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # its directory is fixed when it is imported
    this = trainer(tmp_path, report_to="trackio", project="digits", run_name="one", trackio_space_id=None)
    this.add_callback(AttentionMapCallback(this, this.eval_dataset, every=2, max_examples=2))
    this.train()
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    assert {f"train/{name}" for name in TERMS} <= set().union(*rows)
    assert sum("attention_map" in row for row in rows) == 2
    assert sum(1 for _ in (tmp_path / "trackio").rglob("*.png")) == 2


def test_calls_of_trackio_and_wandb(tmp_path, monkeypatch):
    """Check the calls of the callback with a stub, whether or not the libraries are installed."""
    calls = []
    library = types.SimpleNamespace(Image=lambda pixels: ("image", pixels.shape[-1]), log=calls.append)

    class Tracker(integrations.TrackioCallback):
        def __init__(self):
            self._trackio, self._initialized = library, True

        def on_train_end(self, *args, **kwargs):
            pass

    this = trainer(tmp_path)
    this.add_callback(Tracker())
    this.add_callback(AttentionMapCallback(this, this.eval_dataset, every=10, max_examples=2))
    this.train()
    maps = [row for row in calls if "attention_map" in row]
    assert [row["train/global_step"] for row in maps] == [0, 2]
    assert maps[0]["attention_map"] == ("image", 3)
    assert {f"train/{name}" for name in TERMS} <= set().union(*calls)


@pytest.mark.parametrize("mixing", [DenseMultiMix(num_mixed=20), DenseMultiMix(num_mixed=20, attention="cam"), ERM()])
def test_training_is_the_same_with_and_without_the_callback(tmp_path, mixing):
    """Bit for bit, with dropout and random order: random state, modes and gradients do not change."""
    found = []
    for name in ("with", "without"):
        this = trainer(tmp_path / name, mixing, dropout=0.2)
        watch = _Watch()
        if name == "with":
            maps = tmp_path / "maps"
            this.add_callback(AttentionMapCallback(this, _Noisy(), every=1, max_examples=2, directory=maps))
        this.add_callback(watch)
        this.train()
        found.append((digits.weights(this.model), this.state.log_history, watch.states))
    (a, history, states), (b, other_history, other_states) = found
    digits.same_weights(a, b)
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (history, other_history)]
    assert losses[0] == losses[1] and states == other_states
    assert len(list(maps.iterdir())) == 3


class _Noisy:
    """Examples that are drawn with all random generators, as augmentation does."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        noise = float(torch.rand(())) + np.random.rand() + random.random()
        return {"pixel_values": torch.full((1, 8, 8), noise), "labels": index}


class _Watch(TrainerCallback):
    """Records the random state and the modes after each step, after the callback that draws."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        others = np.random.get_state()[1].tolist(), random.getstate()
        modes = [module.training for module in model.modules()]
        gradients = [p.grad is None for p in model.parameters()]
        self.states.append((torch.get_rng_state().tolist(), others, modes, gradients))


def test_the_map_is_the_attention_that_weights_the_labels(tmp_path):
    this = trainer(tmp_path, DenseMultiMix(num_mixed=20, attention="gap"))
    callback = AttentionMapCallback(this, this.eval_dataset, max_examples=3, directory=tmp_path)
    figure = callback.draw(this.model)
    maps = [axes.images[1].get_array() for axes in figure.axes if len(axes.images) == 2]
    pixel_values = torch.stack([row["pixel_values"] for row in this.eval_dataset.select(range(3))])
    expected = extract(this.model.eval(), "gap", pixel_values=pixel_values).attention
    torch.testing.assert_close(torch.tensor(np.array(maps)), expected.view(3, 4, 4))
    assert [axes.get_title(loc="left") for axes in figure.axes[:6:2]] == [
        f"LABEL_{y}" for y in this.eval_dataset[:3]["label"].tolist()
    ]
    shown = np.array([axes.images[0].get_array() for axes in figure.axes[:6:2]])
    low, high = pixel_values.amin(dim=(1, 2, 3)), pixel_values.amax(dim=(1, 2, 3))
    expected = (pixel_values[:, 0] - low[:, None, None]) / (high - low)[:, None, None]
    np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_images_of_a_processor_are_converted_to_pixels(tmp_path):
    from mm_hf.training.callbacks import _pixels

    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.3] * 3, image_std=[0.4] * 3)
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    values = torch.as_tensor(np.asarray(processor([image])["pixel_values"]))
    np.testing.assert_allclose(_pixels(values, processor)[0] * 255, np.asarray(image), atol=1e-3)


class _Words:
    """The part of a tokenizer that the probe and the callback need."""

    all_special_ids = (0, 2, 3)

    def convert_ids_to_tokens(self, ids):
        return [f"Ġword{i}" for i in ids]


def test_texts_are_drawn_as_weighted_tokens(tmp_path):
    batch = models.batch("bert", b=6)
    rows = [{k: v[i] for k, v in batch.items()} | {"labels": i % 5, "id": f"text {i}"} for i in range(6)]
    model = models.build("bert")
    this = MultiMixTrainer(model, digits.arguments(tmp_path, max_steps=1), train_dataset=Dataset.from_list(rows))
    callback = AttentionMapCallback(this, rows, max_examples=2, directory=tmp_path / "maps")
    assert set(callback.batch) == {"input_ids", "attention_mask", "labels"}
    callback.processing_class = _Words()
    figure = callback.draw(model)
    words = [text.get_text() for text in figure.axes[0].texts]
    output = extract(model, **{k: v[:2] for k, v in batch.items()})
    output.mask &= batch["input_ids"][:2] != 3  # special for the tokenizer, but not in the config of the model
    expected = []
    for i in range(2):
        expected += [f"LABEL_{i}", *(f"word{j}" for j in batch["input_ids"][i][output.mask[i]].tolist())]
    assert words == expected
    assert len(figure.axes[0].patches) == int(output.mask.sum())
    largest = max(figure.axes[0].patches, key=lambda patch: sum(1 - np.array(patch.get_facecolor()[:3])))
    position = figure.axes[0].patches.index(largest)
    flat = torch.cat([output.attention[i][output.mask[i]] for i in range(2)])
    assert position == int(flat.argmax())


def test_texts_are_inside_the_figure_and_do_not_overlap():
    from mm_hf.evaluation.plots.attention import FigureCanvasAgg

    words = [f"w{'x' * (i % 9)}" for i in range(90)]
    figure = plot_token_attention([words, ["not", "bad"]], [np.linspace(0, 1, 90), [0.5, 0.5]], titles=["a", "b"])
    page = figure.axes[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in page.texts]
    frame = page.get_window_extent(renderer)
    for i, box in enumerate(boxes):
        assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1 and frame.y0 - 1 <= box.y0 and box.y1 <= frame.y1 + 1
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert "…" in [text.get_text() for text in page.texts]  # 64 of 90 are shown


def test_inputs_that_cannot_be_drawn_raise(tmp_path):
    this = trainer(tmp_path)
    with pytest.raises(ValueError, match="no tracker that accepts images: set it to tensorboard"):
        AttentionMapCallback(this, this.eval_dataset)
    with pytest.raises(ValueError, match="every and max_examples must be positive"):
        AttentionMapCallback(this, this.eval_dataset, every=0, directory=tmp_path)
    with pytest.raises(ValueError, match="examples is empty"):
        AttentionMapCallback(this, [], directory=tmp_path)
    with pytest.raises(ValueError, match="do not form a grid over images of 8 x 8"):
        plot_image_attention(np.zeros((1, 8, 8)), np.ones((1, 15)) / 15)
    with pytest.raises(ValueError, match="one weight for each of the 2 tokens of text 0, but has 1"):
        plot_token_attention([["a", "b"]], [[1.0]])
    this.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="sharded over processes"):
        AttentionMapCallback(this, this.eval_dataset, directory=Path(tmp_path))
