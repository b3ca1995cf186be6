"""Pushes with the real client to a local Hub server: the pushed files, and loading them elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTForImageClassification,
)

from mm_hf import DenseMultiMix, MultiMix, MultiMixTrainer, load_mixing
from mm_hf.training.hub import load_plan
from mm_hf.training.model_card import _plot_training as plot_training
from tests.helpers import digits
from tests.helpers.hub_server import check_metadata
from tests.helpers.pushing import ANN, BOB, train, trainer_of


def elsewhere(hub, directory, code):
    """Run code in a new process that knows the address of the Hub and cannot import mm_hf."""
    known = {
        "PATH": "/usr/bin:/bin",
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(directory / "home"),
    }
    known |= {
        "OMP_NUM_THREADS": "1",
        "HF_TOKEN": ANN,
        "PYTHONPATH": ":".join(p for p in sys.path if "site-packages" in p),
    }
    script = f"import sys; sys.modules['mm_hf'] = None\n{code}"
    return subprocess.run([sys.executable, "-c", script], cwd=directory, env=known, capture_output=True, text=True)


def snippet(hub, repo_id):
    """Return the usage example of a card."""
    return hub.files(repo_id)["README.md"].decode().split("## Usage\n\n```python\n")[1].split("\n```")[0]


def text_trainer(directory):
    words = ["[UNK]", "[PAD]", "good", "bad", "film", "a"]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=len(words),
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )
    data = [{**tokenizer(f"a {word} film"), "labels": int(word == "good")} for word in ("good", "bad") * 4]
    args = digits.arguments(directory / "films", max_steps=1, hub_token=ANN)
    trainer = MultiMixTrainer(
        BertForSequenceClassification(config),
        args,
        mixing=MultiMix(num_mixed=5),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


# ---- pushed files ----


@pytest.mark.distributed
def test_pushed_model_is_a_plain_model_that_runs_by_name(hub, tmp_path, monkeypatch):
    """Models of one channel, three channels and text; a private repository; with the usage example of the card."""
    monkeypatch.setattr("mm_hf.training.model_card._plot_training", plot_training)
    gray = train(tmp_path / "gray", hub_private_repo=True)
    info = gray.push_to_hub(dataset="digits", tags="handwriting")
    assert info.oid == hub.repos["ann/digits"].branches["main"].oid and hub.repos["ann/digits"].private
    wanted = {
        "model.safetensors",
        "config.json",
        "mixing.json",
        "preprocessor_config.json",
        "README.md",
        "training.png",
    }
    assert wanted <= set(hub.files("ann/digits"))
    color = train(tmp_path / "color", rgb=True, hub_model_id="ann/color", max_steps=1)
    color.push_to_hub()
    text = text_trainer(tmp_path)
    text.push_to_hub()
    images = digits.dataset(1000, 1010)[:]["pixel_values"]
    torch.save(images, tmp_path / "images.pt")
    image = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "picture.png")
    done = elsewhere(
        hub,
        tmp_path,
        f"""
import torch
from transformers import AutoModelForImageClassification, pipeline
model = AutoModelForImageClassification.from_pretrained("ann/digits")
torch.save(model(torch.load("images.pt")).logits, "logits.pt")
scores = pipeline("image-classification", model="ann/color", top_k=10)("picture.png")
torch.save({{one["label"]: one["score"] for one in scores}}, "scores.pt")
print("gray:")
{snippet(hub, "ann/digits")}
print("color:")
{snippet(hub, "ann/color")}
print("text:")
{snippet(hub, "ann/films")}
""",
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = gray.model.eval()(images).logits
        pixels = torch.as_tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
        probabilities = color.model.eval()(pixels).logits.softmax(-1)[0]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=0)
    scores = torch.load(tmp_path / "scores.pt")
    assert [scores[f"LABEL_{i}"] for i in range(10)] == pytest.approx(probabilities.tolist(), abs=1e-5)
    output = done.stdout.split("gray:")[1].split("color:")
    assert re.fullmatch(r"\s*LABEL_\d\s*", output[0]) and output[1].count("'score':") == 6
    assert re.search(r"'label': '(good|bad)'", output[1].split("text:")[1])
    # The token is sent to the Hub only, and not to the storage of large files.
    assert {request.token for request in hub.requests if request.host.startswith("localhost")} == {None}
    # Other users have no access to the private repository.
    with pytest.raises(OSError, match="ann/digits is not a local folder and is not a valid model identifier"):
        ViTForImageClassification.from_pretrained("ann/digits", token=BOB, cache_dir=str(tmp_path / "bobs"))


def test_method_is_loaded_from_the_hub_by_name(hub, tmp_path):
    trainer = train(tmp_path, DenseMultiMix(num_mixed=20, alpha=(0.5, 2.0)), max_steps=1)
    huggingface_hub.HfApi(token=ANN).create_repo("digits")
    huggingface_hub.HfApi(token=ANN).create_branch("ann/digits", branch="trial/1")
    trainer.push_to_hub(revision="trial/1")
    assert "mixing.json" not in hub.files("ann/digits") and "mixing.json" in hub.files("ann/digits", "trial/1")
    where = {"revision": "trial/1", "cache_dir": str(tmp_path / "cache"), "token": ANN}
    mixing = load_mixing("ann/digits", **where)
    assert mixing == trainer.mixing == load_mixing(trainer.args.output_dir)
    assert load_plan("ann/digits", **where) == trainer.mixing_handle.plan
    again = MultiMixTrainer(digits.vit(), digits.arguments(tmp_path), mixing=mixing, train_dataset=digits.dataset())
    assert again.mixing == trainer.mixing
    del where["revision"]
    with pytest.raises(OSError, match=r"ann/digits does not appear to have a file named mixing.json"):
        load_mixing("ann/digits", **where)
    with pytest.raises(OSError, match="ann/nothing is not a local folder and is not a valid model identifier"):
        load_mixing("ann/nothing", **where)
    with pytest.raises(FileNotFoundError, match=r"no mixing.json in .*: the model was not saved by MultiMixTrainer"):
        load_mixing(tmp_path)
    hub.fail("HEAD", "/resolve/", 500)
    with pytest.raises(OSError, match="couldn't connect"):
        load_mixing("ann/digits", **where | {"cache_dir": str(tmp_path / "other")})


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_checkpoints_are_pushed_during_training(hub, tmp_path, strategy):
    pushing = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True}
    trainer = train(tmp_path, save_strategy="steps", save_steps=1, **pushing)
    files = hub.files("ann/digits")
    assert {"model.safetensors", "mixing.json", "README.md", "config.json", "training_args.bin"} <= set(files)
    # The commit message names the step.
    assert "Training in progress, step 1" in hub.messages("ann/digits")
    assert "Training in progress, step 2" in hub.messages("ann/digits")
    assert files["model.safetensors"] == (tmp_path / "digits" / "checkpoint-2" / "model.safetensors").read_bytes()
    assert check_metadata(files["README.md"].decode()) == []
    folders = {path.split("/")[0] for path in files if "/" in path}
    kept = {"every_save": set(), "checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == kept[strategy]
    for folder in folders:
        assert {f"{folder}/{name}" for name in ("mixing.json", "trainer_state.json", "optimizer.pt")} <= set(files)
    if strategy != "checkpoint":
        return
    # The pushed checkpoint is enough to resume on another machine.
    place = huggingface_hub.snapshot_download(
        "ann/digits", allow_patterns="last-checkpoint/*", token=ANN, cache_dir=str(tmp_path / "cache")
    )
    assert load_mixing(f"{place}/last-checkpoint") == trainer.mixing
    resumed = trainer_of(tmp_path / "elsewhere", load_mixing(f"{place}/last-checkpoint"), max_steps=3)
    resumed.train(resume_from_checkpoint=f"{place}/last-checkpoint")
    assert resumed.state.global_step == 3 and resumed.state.log_history[0] == trainer.state.log_history[0]


def test_final_model_is_pushed_with_its_results(hub, tmp_path):
    trainer = train(tmp_path, push_to_hub=True, hub_strategy="end", save_strategy="steps", save_steps=1)
    assert hub.messages("ann/digits") == ["initial commit"]
    trainer.save_model()
    assert hub.messages("ann/digits")[-1] == "Model save"
    trainer.push_to_hub(dataset="Digits", blocking=False).result()
    card = hub.files("ann/digits")["README.md"].decode()
    assert hub.messages("ann/digits")[-1] == "End of training" and "name: Digits" in card


def test_edited_card_is_kept(hub, tmp_path):
    trainer = train(tmp_path, max_steps=1)
    card = Path(trainer.args.output_dir) / "README.md"
    card.write_text("---\ntags: [mine]\n---\n# My digits\n\nIntended uses.\n")
    trainer.push_to_hub()
    assert hub.files("ann/digits")["README.md"].decode() == card.read_text() and "Intended uses" in card.read_text()
    card.unlink()
    trainer.push_to_hub()
    assert "dense-multimix" in hub.files("ann/digits")["README.md"].decode()
