"""`examples/run_image_classification_no_trainer.py`: a training loop with Accelerate."""

import json

import accelerate
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from transformers import AutoImageProcessor, AutoModelForImageClassification

from mm_hf.methods import DenseMultiMix, Mixup
from mm_hf.training.hub import load_mixing, load_num_mixed
from tests.helpers import launch, loop
from tests.helpers.pushing import ANN


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Train two epochs of seven mini-batches, four updates each; return the directory and the weights."""
    directory = tmp_path_factory.mktemp("full")
    return directory, loop.run(directory, checkpointing_steps=1)


def test_saved_model_is_plain(uninterrupted):
    directory, _ = uninterrupted
    model, info = AutoModelForImageClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()) and model.config.id2label[7] == "7"
    assert not any("mm_hf" in name for name in model.__dict__)
    assert AutoImageProcessor.from_pretrained(directory).size["height"] == 8
    assert load_mixing(directory) == DenseMultiMix(num_mixed=50)
    results = json.loads((directory / "all_results.json").read_text())
    assert results["steps"] == 8 and results["eval_examples"] == 45 and 0 <= results["eval_accuracy"] <= 1


# In the middle of an epoch, at its end, at the start of the next one, and after training.
@pytest.mark.parametrize("step", [3, 4, 5, 8])
def test_resumed_run_equals_uninterrupted_run(uninterrupted, tmp_path, step):
    directory, weights = uninterrupted
    again = loop.run(tmp_path, resume_from_checkpoint=directory / f"step_{step}")
    assert same(again, weights)
    assert (tmp_path / "all_results.json").read_text() == (directory / "all_results.json").read_text()


def test_checkpoints_and_workers_do_not_change_the_weights(uninterrupted, tmp_path):
    assert same(loop.run(tmp_path, checkpointing_steps="epoch", dataloader_num_workers=2), uninterrupted[1])
    again = loop.run(tmp_path / "again", resume_from_checkpoint=tmp_path / "epoch_0", dataloader_num_workers=1)
    assert same(again, uninterrupted[1])


def test_mixing_method_changes_the_weights(uninterrupted, tmp_path):
    assert not same(loop.run(tmp_path, mixing="erm", num_mixed=None), uninterrupted[1])


def test_number_of_auto_is_kept(tmp_path):
    options = {"num_mixed": "auto", "num_train_epochs": 3, "max_train_steps": 7}
    loop.run(tmp_path, checkpointing_steps=6, **options)
    selected = load_num_mixed(tmp_path / "step_6")
    assert selected >= 32
    loop.run(tmp_path / "again", resume_from_checkpoint=tmp_path / "step_6", **options)
    assert load_num_mixed(tmp_path / "again") == selected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpointing_steps": "often"}, "must be a number of optimizer steps or 'epoch', but is 'often'"),
        ({"resume_from_checkpoint": "elsewhere/step_3"}, "written with --checkpointing_steps, but is elsewhere/step_3"),
        ({"resume": 3, "per_device_train_batch_size": 8}, "per_device_train_batch_size=16, which is now 8"),
        (
            {"resume": 3, "num_mixed": 60},
            "was trained with other settings: num_mixed=50, which is now 60.*--allow_changed_settings",
        ),
    ],
)
def test_invalid_options_raise_before_training(uninterrupted, tmp_path, options, message):
    if "resume" in options:
        step = options.pop("resume")
        options["resume_from_checkpoint"] = uninterrupted[0] / f"step_{step}"
    with pytest.raises(ValueError, match=message):
        loop.run(tmp_path, **options)


def test_trackers_receive_metrics_and_settings_but_no_token(tmp_path, monkeypatch):
    settings, logs = {}, []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", True, None

        def __init__(self, run_name, logging_dir, **kwargs):
            super().__init__()

        def store_init_configuration(self, values):
            settings.update(values)

        def log(self, values, step, **kwargs):
            logs.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    loop.run(tmp_path, "--with_tracking", report_to="tensorboard", hub_token="hf_secret", token="hf_secret")
    assert settings["learning_rate"] == 0.001 and settings["num_mixed"] == 50 and settings["lr_scheduler_type"]
    assert "hf_secret" not in str(settings) and not any("token" in name for name in settings)
    assert [step for step, _ in logs] == [4, 8]
    assert {"train_loss", "eval_accuracy", "loss_dense", "epoch"} <= logs[0][1].keys()


def test_pushed_files_contain_no_checkpoints_and_no_token(tmp_path, hub):
    out = tmp_path / "digits"
    loop.run(out, "--push_to_hub", max_train_steps=2, checkpointing_steps=1, hub_token=ANN, hub_model_id="ann/digits")
    files = hub.files("ann/digits")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "mixing.json", "README.md"} <= files.keys()
    assert (out / "step_1").is_dir() and not any("step_" in name for name in files)
    assert "dense-multimix" in files["README.md"].decode()
    assert not any(ANN.encode() in content for content in files.values())


def test_tracking_without_a_tracker_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(ValueError, match="requires a tracker for --report_to tensorboard"):
        loop.run(tmp_path, "--with_tracking", report_to="tensorboard")


def test_token_is_in_no_output(tmp_path, capfd, caplog):
    loop.run(tmp_path, max_train_steps=1, hub_token="hf_secret", token="hf_secret", mixing="mixup", num_mixed=None)
    everything = capfd.readouterr().out + caplog.text
    everything += "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    assert "mixup" in everything.lower() and "hf_secret" not in everything
    assert load_mixing(tmp_path) == Mixup()


TWO_PROCESSES = """
import json, os, sys
from tests.helpers import loop
from accelerate import PartialState

end = PartialState.destroy_process_group
PartialState.destroy_process_group = lambda *args, **kwargs: None  # the next run uses it
directory, rank = sys.argv[1], int(os.environ["RANK"])
result = {}
for name, options in {
    "separate": {},
    "as one": {"gather_across_devices": True},
}.items():
    full = loop.run(f"{directory}/{name}", checkpointing_steps=3, **options)
    assert PartialState().num_processes == 2
    again = loop.run(f"{directory}/{name}, again", resume_from_checkpoint=f"{directory}/{name}/step_3", **options)
    result[name] = {
        "same": all((full[k] == again[k]).all().item() for k in full),
        "results": json.load(open(f"{directory}/{name}/all_results.json")),
    }
json.dump(result, open(f"{directory}/rank{rank}.json", "w"))
PartialState().wait_for_everyone()
end(PartialState())
"""


def test_resumed_run_equals_uninterrupted_run_on_two_ranks(tmp_path):
    first, second = launch.launch(tmp_path, TWO_PROCESSES, environment={"ACCELERATE_USE_CPU": "true"})
    for name in ("separate", "as one"):
        assert first[name]["same"] and second[name]["same"]
        # 4 mini-batches per rank are 2 updates per epoch; the evaluation has each example once.
        assert first[name]["results"]["steps"] == 4 and first[name]["results"]["eval_examples"] == 45
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "as one")
    assert model.config.num_labels == 10


def test_processes_that_would_train_independently_raise(tmp_path, monkeypatch):
    # As with WORLD_SIZE and LOCAL_RANK, with which Accelerate would wait for the other process.
    monkeypatch.setattr("mm_hf.distributed.started_processes", lambda: 2)
    with pytest.raises(ValueError, match="2 processes were started, but Accelerate has 1"):
        loop.run(tmp_path)
