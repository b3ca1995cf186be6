"""Pushes by the real client to a Hub on this machine: what arrives, how it loads, and what is left when it fails."""

import copy
import logging
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import digits
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from hub_server import HubServer, check_metadata
from huggingface_hub import constants
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from mm_hf import DenseMultiMix, MultiMix, MultiMixTrainer, load_mixing
from mm_hf.card import _picture as picture
from mm_hf.hub import load_plan
from mm_hf.push import HubToken, PushError, reason, upload_command

ANN, READER, BOB = "hf_annsOwnSecret", "hf_annsReader", "hf_bobsOwn"
DENSE = DenseMultiMix(num_mixed=20)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer({ANN: ("ann", "write"), READER: ("ann", "read"), BOB: ("bob", "write")}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "nobody-logged-in"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("mm_hf.card._picture", lambda *_: None)  # seconds; drawn in one test, and in test_card.py
        yield server


def trainer_of(directory, mixing=DENSE, rgb=False, **args):
    channels = 3 if rgb else 1
    data = digits.dataset()
    if rgb:
        data = data.with_format(None).map(lambda row: {"pixel_values": np.repeat(row["pixel_values"], 3, 0)})
        data = data.with_format("torch")
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.5] * channels, do_convert_rgb=rgb
    )
    settings = {"max_steps": 2, "hub_token": ANN, "eval_strategy": "steps", "eval_steps": 1, **args}
    return MultiMixTrainer(
        digits.vit(num_channels=channels),
        digits.arguments(directory / "digits", **settings),
        mixing=mixing,
        train_dataset=data,
        eval_dataset=data.select(range(40)),
        processing_class=processor,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def train(directory, *args, **settings):
    trainer = trainer_of(directory, *args, **settings)
    trainer.train()
    return trainer


def elsewhere(hub, directory, code):
    """Run code in a process that has never seen the model: it knows where the Hub is, and mm_hf is not installed."""
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
    """The lines of Python under "Use" in a card."""
    return hub.files(repo_id)["README.md"].decode().split("## Use\n\n```python\n")[1].split("\n```")[0]


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


# ---- what is pushed ----


def test_what_is_pushed_is_a_plain_model_that_runs_by_name(hub, tmp_path, one_thread, monkeypatch):
    """One channel, three channels and text; a private repository; by the lines that the card shows."""
    monkeypatch.setattr("mm_hf.card._picture", picture)
    grey = train(tmp_path / "grey", hub_private_repo=True)
    info = grey.push_to_hub(dataset="digits", tags="handwriting")
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
    colour = train(tmp_path / "colour", rgb=True, hub_model_id="ann/colour", max_steps=1)
    colour.push_to_hub()
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
scores = pipeline("image-classification", model="ann/colour", top_k=10)("picture.png")
torch.save({{one["label"]: one["score"] for one in scores}}, "scores.pt")
print("grey:")
{snippet(hub, "ann/digits")}
print("colour:")
{snippet(hub, "ann/colour")}
print("text:")
{snippet(hub, "ann/films")}
""",
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = grey.model.eval()(images).logits
        pixels = torch.as_tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
        probabilities = colour.model.eval()(pixels).logits.softmax(-1)[0]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=0)
    scores = torch.load(tmp_path / "scores.pt")
    assert [scores[f"LABEL_{i}"] for i in range(10)] == pytest.approx(probabilities.tolist(), abs=1e-5)
    said = done.stdout.split("grey:")[1].split("colour:")
    assert re.fullmatch(r"\s*LABEL_\d\s*", said[0]) and said[1].count("'score':") == 6
    assert re.search(r"'label': '(good|bad)'", said[1].split("text:")[1])
    # The token goes to the Hub and not to where the Hub sends the client for large files.
    assert {request.token for request in hub.requests if request.host.startswith("localhost")} == {None}
    # Nobody else sees the private repository.
    with pytest.raises(OSError, match="ann/digits is not a local folder and is not a valid model identifier"):
        ViTForImageClassification.from_pretrained("ann/digits", token=BOB, cache_dir=str(tmp_path / "bobs"))


def test_the_method_is_read_back_by_name(hub, tmp_path):
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
def test_checkpoints_are_pushed_while_it_trains(hub, tmp_path, strategy):
    pushing = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True}
    trainer = train(tmp_path, save_strategy="steps", save_steps=1, **pushing)
    files = hub.files("ann/digits")
    assert {"model.safetensors", "mixing.json", "README.md", "config.json", "training_args.bin"} <= set(files)
    # The message tells of the step, the card of the evaluations until then.
    assert "Training in progress, step 1" in hub.messages("ann/digits")
    assert "Training in progress, step 2" in hub.messages("ann/digits")
    assert check_metadata(files["README.md"].decode()) == []
    folders = {path.split("/")[0] for path in files if "/" in path}
    kept = {"every_save": set(), "checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == kept[strategy]
    for folder in folders:
        assert {f"{folder}/{name}" for name in ("mixing.json", "trainer_state.json", "optimizer.pt")} <= set(files)
    if strategy != "checkpoint":
        return
    # What was pushed is enough to go on elsewhere.
    place = huggingface_hub.snapshot_download(
        "ann/digits", allow_patterns="last-checkpoint/*", token=ANN, cache_dir=str(tmp_path / "cache")
    )
    assert load_mixing(f"{place}/last-checkpoint") == trainer.mixing
    longer = trainer_of(tmp_path / "elsewhere", load_mixing(f"{place}/last-checkpoint"), max_steps=3)
    longer.train(resume_from_checkpoint=f"{place}/last-checkpoint")
    assert longer.state.global_step == 3 and longer.state.log_history[0] == trainer.state.log_history[0]


def test_the_end_is_pushed_with_its_results(hub, tmp_path):
    trainer = train(tmp_path, push_to_hub=True, hub_strategy="end", save_strategy="steps", save_steps=1)
    assert hub.messages("ann/digits") == ["initial commit"]
    trainer.save_model()
    assert hub.messages("ann/digits")[-1] == "Model save"
    trainer.push_to_hub(dataset="Digits", blocking=False).result()
    card = hub.files("ann/digits")["README.md"].decode()
    assert hub.messages("ann/digits")[-1] == "End of training" and "name: Digits" in card


def test_a_card_that_a_person_has_completed_is_kept(hub, tmp_path):
    trainer = train(tmp_path, max_steps=1)
    card = Path(trainer.args.output_dir) / "README.md"
    card.write_text("---\ntags: [mine]\n---\n# My digits\n\nWhat they are good for.\n")
    trainer.push_to_hub()
    assert hub.files("ann/digits")["README.md"].decode() == card.read_text() and "good for" in card.read_text()
    card.unlink()
    trainer.push_to_hub()
    assert "dense-multimix" in hub.files("ann/digits")["README.md"].decode()


# ---- when it fails ----


def pushed_later(hub, message, token=ANN):
    """Do what the message says, as a person would."""
    command = shlex.split(message.split("To push it later: ")[1])
    assert command[0] == "hf"
    executable = Path(sys.executable).parent / "hf"
    environment = {"PATH": "/usr/bin:/bin", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    environment["HF_HOME"] = str(Path(command[3]).parent / "home")
    done = subprocess.run([executable, *command[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_login_the_model_is_saved_and_can_be_pushed_later(hub, tmp_path):
    """`push_to_hub=False`: Trainer meets the Hub only after the training, and before it saves."""
    trainer = train(tmp_path, hub_token=None, hub_private_repo=True, save_strategy="steps", save_steps=1)
    shutil.rmtree(tmp_path / "digits" / "checkpoint-1")
    with pytest.raises(
        PushError, match=r"saved in .*, but it was not pushed to 'digits': the Hub does not accept the"
    ) as e:
        trainer.push_to_hub()
    assert "hf auth login" in str(e.value) and not hub.repos
    saved = ViTForImageClassification.from_pretrained(tmp_path / "digits")
    digits.same_weights(digits.weights(saved), digits.weights(trainer.model))
    assert load_mixing(tmp_path / "digits") == DENSE
    pushed_later(hub, str(e.value))
    files = hub.files("ann/digits")
    assert files["model.safetensors"] == (tmp_path / "digits" / "model.safetensors").read_bytes()
    assert "README.md" in files and not [path for path in files if path.startswith("checkpoint-")]
    assert hub.repos["ann/digits"].private


@pytest.mark.parametrize(
    ("method", "path", "what", "why"),
    [
        ("POST", "/commit/", 500, "the Hub has a problem of its own (HTTP status 500)"),
        ("POST", "/commit/", 403, "the token may not write there"),
        ("POST", "/commit/", 409, "the Hub refuses it, as the test wants it (HTTP status 409)"),
        ("POST", "/preupload/", 404, "there is no such repository or branch"),
        ("POST", "/batch", 401, "the Hub does not accept the token"),
        ("PUT", "/storage/", "cut", "Error"),
        ("PUT", "/storage/", 413, "the Hub takes no files or folders of this size"),
        ("POST", "/validate-yaml", 400, "Invalid metadata in README.md"),
    ],
)
def test_a_push_that_fails_says_why_and_leaves_the_model(hub, tmp_path, method, path, what, why):
    trained = trainer_of(tmp_path)
    hub.fail(method, path, what)
    with pytest.raises(PushError) as raised:
        trained.push_to_hub()
    message = str(raised.value)
    directory = trained.args.output_dir
    assert message.startswith(f"The model is saved in {directory}, but it was not pushed to 'ann/digits': ")
    assert why in message and f"hf upload ann/digits {directory} . " in message
    saved = ViTForImageClassification.from_pretrained(directory)
    digits.same_weights(digits.weights(saved), digits.weights(trained.model))
    assert "model.safetensors" not in hub.files("ann/digits")
    hub.failures.clear()
    trained.push_to_hub()
    assert "model.safetensors" in hub.files("ann/digits")


def test_a_connection_that_is_cut_once_is_no_failure(hub, tmp_path):
    hub.fail("PUT", "/storage/", "cut", times=1)
    hub.fail("POST", "/preupload/", 503, times=2)
    trainer_of(tmp_path).push_to_hub()
    assert "model.safetensors" in hub.files("ann/digits")


def test_nothing_but_the_push_is_said_to_be_a_failed_push(hub, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    trained = trainer_of(tmp_path)
    monkeypatch.setattr(trained, "_save", full)
    with pytest.raises(OSError, match="^No space left") as raised:
        trained.push_to_hub()
    assert not isinstance(raised.value, PushError)


@pytest.mark.parametrize(
    ("token", "name", "why"),
    [
        (None, "digits", "the Hub does not accept the token, or there is none"),
        ("hf_expired", "digits", "the Hub does not accept the token"),
        (READER, "digits", "the token may not write there"),
        (READER, "ann/there", "the token may not write there"),
        (ANN, "bob/digits", "the token may not write there"),
    ],
)
def test_what_cannot_be_pushed_is_found_out_before_training(hub, tmp_path, token, name, why):
    huggingface_hub.HfApi(token=ANN).create_repo("there")
    args = digits.arguments(tmp_path, push_to_hub=True, hub_token=token, hub_model_id=name)
    with pytest.raises(PushError, match=f"The repository '{name}' cannot be pushed to: {re.escape(why)}"):
        MultiMixTrainer(digits.vit(), args, mixing=DENSE, train_dataset=digits.dataset())


def test_without_a_network(hub, tmp_path, monkeypatch):
    trained = trainer_of(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="saved in .* not pushed to 'digits': OfflineModeIsEnabled: .*HF_HUB_OFFLINE"):
        trained.push_to_hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", huggingface_hub.HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(PushError, match="saved in .* not pushed to 'digits': ConnectError: .*refused"):
        trained.push_to_hub()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_training_goes_on_when_checkpoints_cannot_be_pushed(hub, tmp_path, strategy, warnings_of_mm_hf):
    hub.fail("POST", "/commit/", 500)
    pushing = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True}
    trainer = train(tmp_path, save_strategy="steps", save_steps=1, **pushing)
    assert trainer.state.global_step == 2 and hub.messages("ann/digits") == ["initial commit"]
    told = [text for text in warnings_of_mm_hf() if "not pushed" in text]
    assert len(told) == (2 if strategy == "every_save" else 4)  # each upload is told of once
    assert all("Training goes on" in text and "a problem of its own (HTTP status 500)" in text for text in told)
    for directory in ("", "checkpoint-2"):
        saved = ViTForImageClassification.from_pretrained(tmp_path / "digits" / directory)
        digits.same_weights(digits.weights(saved), digits.weights(trainer.model))
    trainer.save_model()  # told of, too, and no error
    assert len([text for text in warnings_of_mm_hf() if "not pushed" in text]) == len(told) + 1
    with pytest.raises(PushError):
        trainer.push_to_hub()
    hub.failures.clear()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files("ann/digits")


def test_a_checkpoint_that_was_not_pushed_is_made_up_for(hub, tmp_path, warnings_of_mm_hf):
    hub.fail("POST", "/commit/", 500, times=1)
    train(tmp_path, save_strategy="steps", save_steps=1, push_to_hub=True, hub_always_push=True)
    assert len([text for text in warnings_of_mm_hf() if "not pushed" in text]) == 1
    assert hub.messages("ann/digits") == ["initial commit", "Training in progress, step 2"]


def test_a_card_that_cannot_be_written_stops_no_training(hub, tmp_path, monkeypatch, warnings_of_mm_hf):
    def broken(*_):
        raise KeyError("no such thing")

    monkeypatch.setattr("mm_hf.trainer.write_card", broken)
    train(tmp_path, save_strategy="steps", save_steps=1, push_to_hub=True)
    assert "model.safetensors" in hub.files("ann/digits")
    assert any("card of this checkpoint could not be written" in text for text in warnings_of_mm_hf())


@pytest.fixture
def warnings_of_mm_hf(caplog):
    with caplog.at_level("WARNING", logger="mm_hf"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("mm_hf")]


# ---- the token ----


def test_the_token_is_nowhere_but_in_requests(hub, tmp_path, caplog, capfd):
    """All that is saved, pushed, printed, logged and raised, failures included, is searched for it."""
    caplog.set_level("DEBUG")
    for name in ("transformers", "huggingface_hub", "mm_hf"):
        caplog.set_level("DEBUG", logger=name)
    monitor = logging.getLogger("huggingface_hub")
    monitor.propagate = True
    hub.fail("POST", "/commit/", 500, times=1)
    pushing = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    trainer = train(tmp_path, save_strategy="steps", save_steps=1, **pushing)
    trainer.args.hub_token = str(ANN)  # as in a notebook
    trainer.push_to_hub()
    hub.fail("POST", "/commit/", 403)
    trainer.train()
    with pytest.raises(PushError) as raised:
        trainer.push_to_hub()
    print(trainer.args, repr(trainer.args.hub_token), trainer.args.to_json_string())
    told = "".join(traceback.format_exception(raised.value)) + caplog.text + "".join(capfd.readouterr())
    assert len(told) > 1000 and ANN not in told
    contents = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    contents |= {
        f"{c.oid} {p}": b for c in hub.repos["ann/digits"].branches["main"].history() for p, b in c.files.items()
    }
    assert any("training_args.bin" in path for path in contents)
    assert [path for path, content in contents.items() if ANN.encode() in content] == []
    assert any(request.token == ANN for request in hub.requests)
    arguments = torch.load(tmp_path / "digits" / "training_args.bin", weights_only=False)
    assert arguments.hub_token is None and arguments.learning_rate == trainer.args.learning_rate
    assert trainer.args.hub_token == ANN and copy.deepcopy(trainer.args).hub_token == ANN


def test_the_message_in_the_documentation_is_what_is_said():
    text = " ".join((Path(__file__).parent.parent / "docs" / "hub.md").read_text().split())
    error = SimpleNamespace(response=SimpleNamespace(status_code=500))
    assert f"not pushed to 'ann/beans': {reason(error)}. To push it later: " in text
    assert f": {upload_command('ann/beans', 'outputs/beans')} " in text
    assert upload_command("a/b", "my runs", "trial", True).endswith("--revision trial --private")
    assert "'my runs'" in upload_command("a/b", "my runs")


def test_a_token_is_text_that_is_not_pickled():
    token = HubToken("hf_secret")
    assert token == "hf_secret" and f"Bearer {token}" == "Bearer hf_secret"
    assert pickle.loads(pickle.dumps({"token": token})) == {"token": None}
    assert copy.copy(token) == copy.deepcopy([token])[0] == "hf_secret" and "secret" not in repr([token])
