"""Failed pushes keep the model and report the describe_push_error, and the token appears in no file, log or message."""

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

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from transformers import ViTForImageClassification

from mm_hf import MultiMixTrainer, load_mixing
from mm_hf.training.push import HubToken, PushError, describe_push_error, upload_command
from tests.helpers import digits
from tests.helpers.pushing import ANN, DENSE, READER, train, trainer_of


def pushed_later(hub, message, token=ANN):
    """Run the command of the message."""
    command = shlex.split(message.split("To push it later: ")[1])
    assert command[0] == "hf"
    executable = Path(sys.executable).parent / "hf"
    environment = {"PATH": "/usr/bin:/bin", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    environment["HF_HOME"] = str(Path(command[3]).parent / "home")
    done = subprocess.run([executable, *command[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_model_is_saved_without_login_and_can_be_pushed_later(hub, tmp_path):
    """With `push_to_hub=False`, Trainer contacts the Hub after training and before it saves."""
    trainer = train(tmp_path, hub_token=None, hub_private_repo=True, save_strategy="steps", save_steps=1)
    shutil.rmtree(tmp_path / "digits" / "checkpoint-1")
    with pytest.raises(PushError, match=r"saved in .*, but it was not pushed to 'digits': the token is missing") as e:
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
        ("POST", "/commit/", 500, "the Hub has an internal error (HTTP status 500)"),
        ("POST", "/commit/", 403, "the token has no write access"),
        ("POST", "/commit/", 409, "the Hub rejected it: requested by the test (HTTP status 409)"),
        ("POST", "/preupload/", 404, "the repository or branch does not exist"),
        ("POST", "/batch", 401, "the token is missing or invalid"),
        ("PUT", "/storage/", "cut", "Error"),
        ("PUT", "/storage/", 413, "a file or folder is too large for the Hub"),
        ("POST", "/validate-yaml", 400, "Invalid metadata in README.md"),
    ],
)
def test_failed_push_reports_the_reason_and_keeps_the_model(hub, tmp_path, method, path, what, why):
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


def test_interrupted_connection_is_retried(hub, tmp_path):
    hub.fail("PUT", "/storage/", "cut", times=1)
    hub.fail("POST", "/preupload/", 503, times=2)
    trainer_of(tmp_path).push_to_hub()
    assert "model.safetensors" in hub.files("ann/digits")


def test_error_while_saving_is_not_reported_as_a_push_error(hub, tmp_path, monkeypatch):
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
        (None, "digits", "the token is missing or invalid"),
        ("hf_expired", "digits", "the token is missing or invalid"),
        (READER, "digits", "the token has no write access"),
        (READER, "ann/there", "the token has no write access"),
        (ANN, "bob/digits", "the token has no write access"),
    ],
)
def test_missing_write_access_is_reported_before_training(hub, tmp_path, token, name, why):
    huggingface_hub.HfApi(token=ANN).create_repo("there")
    args = digits.arguments(tmp_path, push_to_hub=True, hub_token=token, hub_model_id=name)
    with pytest.raises(PushError, match=f"The repository '{name}' cannot be pushed to: {re.escape(why)}"):
        MultiMixTrainer(digits.vit(), args, mixing=DENSE, train_dataset=digits.dataset())


def test_push_without_network_raises_a_push_error(hub, tmp_path, monkeypatch):
    trained = trainer_of(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="saved in .* not pushed to 'digits': OfflineModeIsEnabled: .*HF_HUB_OFFLINE"):
        trained.push_to_hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", huggingface_hub.HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(PushError, match="saved in .* not pushed to 'digits': ConnectError: .*refused"):
        trained.push_to_hub()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_training_continues_when_checkpoint_pushes_fail(hub, tmp_path, strategy, warnings_of_mm_hf):
    hub.fail("POST", "/commit/", 500)
    pushing = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True}
    trainer = train(tmp_path, save_strategy="steps", save_steps=1, **pushing)
    assert trainer.state.global_step == 2 and hub.messages("ann/digits") == ["initial commit"]
    warnings = [text for text in warnings_of_mm_hf() if "not pushed" in text]
    assert len(warnings) == (2 if strategy == "every_save" else 4)  # one per upload
    assert all("Training continues" in text and "an internal error (HTTP status 500)" in text for text in warnings)
    for directory in ("", "checkpoint-2"):
        saved = ViTForImageClassification.from_pretrained(tmp_path / "digits" / directory)
        digits.same_weights(digits.weights(saved), digits.weights(trainer.model))
    trainer.save_model()  # a warning and no error
    assert len([text for text in warnings_of_mm_hf() if "not pushed" in text]) == len(warnings) + 1
    with pytest.raises(PushError):
        trainer.push_to_hub()
    hub.failures.clear()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files("ann/digits")


def test_failed_checkpoint_push_is_retried(hub, tmp_path, warnings_of_mm_hf):
    hub.fail("POST", "/commit/", 500, times=1)
    train(tmp_path, save_strategy="steps", save_steps=1, push_to_hub=True, hub_always_push=True)
    assert len([text for text in warnings_of_mm_hf() if "not pushed" in text]) == 1
    assert hub.messages("ann/digits") == ["initial commit", "Training in progress, step 2"]


def test_error_in_the_card_does_not_stop_training(hub, tmp_path, monkeypatch, warnings_of_mm_hf):
    def broken(*_):
        raise KeyError("no such thing")

    monkeypatch.setattr("mm_hf.training.trainer.write_card", broken)
    train(tmp_path, save_strategy="steps", save_steps=1, push_to_hub=True)
    assert "model.safetensors" in hub.files("ann/digits")
    assert any("card of this checkpoint could not be written" in text for text in warnings_of_mm_hf())


@pytest.fixture
def warnings_of_mm_hf(caplog):
    with caplog.at_level("WARNING", logger="mm_hf"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("mm_hf")]


# ---- the token ----


def test_token_appears_only_in_requests(hub, tmp_path, caplog, capfd):
    """Search all files, pushes, output, logs and errors for the token."""
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
    output = "".join(traceback.format_exception(raised.value)) + caplog.text + "".join(capfd.readouterr())
    assert len(output) > 1000 and ANN not in output
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


def test_message_in_the_documentation_is_current():
    text = " ".join((Path(__file__).parents[2] / "docs" / "hub.md").read_text().split())
    error = SimpleNamespace(response=SimpleNamespace(status_code=500))
    assert f"not pushed to 'ann/beans': {describe_push_error(error)}. To push it later: " in text
    assert f": {upload_command('ann/beans', 'outputs/beans')} " in text
    assert upload_command("a/b", "my runs", "trial", True).endswith("--revision trial --private")
    assert "'my runs'" in upload_command("a/b", "my runs")


def test_token_is_a_string_that_is_not_pickled():
    token = HubToken("hf_secret")
    assert token == "hf_secret" and f"Bearer {token}" == "Bearer hf_secret"
    assert pickle.loads(pickle.dumps({"token": token})) == {"token": None}
    assert copy.copy(token) == copy.deepcopy([token])[0] == "hf_secret" and "secret" not in repr([token])


def test_nothing_that_is_pushed_contains_a_directory_of_the_machine(hub, tmp_path):
    arguments = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    trainer = trainer_of(tmp_path, hub_model_id="ann/digits", hub_strategy="checkpoint", **arguments)
    trainer.model.config._name_or_path = str(tmp_path / "base")
    trainer.train()
    trainer.save_state()
    trainer.push_to_hub()
    written = [path for path in (tmp_path / "digits").rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path for path in written if str(tmp_path).encode() in path.read_bytes()] == []
