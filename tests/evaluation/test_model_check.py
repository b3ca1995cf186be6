"""`mm_hf.check_model`, `mm-hf check` and `mm-hf models`."""

import re

import pytest
import torch
from transformers import (
    ASTFeatureExtractor,
    BertTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
)

from mm_hf import check_model
from mm_hf.cli import main
from mm_hf.cli.models import select
from mm_hf.data import supported_models as table
from mm_hf.data.dummy_inputs import SENTENCES, detect_task, example_batch, load
from mm_hf.evaluation.model_check import mixed_error
from mm_hf.methods import default_methods
from tests.helpers import digits, models, zoo
from tests.helpers.commands import command_error

pytestmark = pytest.mark.filterwarnings("ignore")
MULTIMIX_ONLY = "PerceiverForSequenceClassification"


def batch_for(name, model):
    return {**zoo.batch(name, model), "labels": torch.arange(4) % 5}


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "BertForSequenceClassification", "GPT2ForSequenceClassification"]
)
def test_check_model_measures_errors_and_costs(name):
    model = zoo.build(name)
    result = check_model(model, batch_for(name, model), other_inputs=zoo.batch(name, model, b=3, seed=5), rounds=2)
    assert result.pooled_error < 1e-5 and result.mixed_error < 1e-5
    assert result.attention == "cls" and result.plan.model_class == name
    assert result.problems["dense_multimix"] == result.problems["multimix"] == "" and set(result.problems) == set(
        default_methods()
    )
    trained = {method for method, problem in result.problems.items() if not problem}
    assert set(result.cost) == trained - {"erm"} and all(0.2 < cost < 50 for cost in result.cost.values())
    if "Sequence" in name:
        assert "CutMix cuts and pastes images" in result.problems["cutmix"]


def test_check_model_gives_the_reason_per_method():
    model = zoo.build(MULTIMIX_ONLY)
    result = check_model(model, batch_for(MULTIMIX_ONLY, model), rounds=0)
    assert result.plan is None and "gives no per-location logits" in result.reason and result.mixed_error < 1e-5
    assert "gives no per-location logits" in result.problems["dense_multimix"] and result.problems["multimix"] == ""

    model = digits.vit()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 10), torch.nn.Tanh())
    batch = {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.arange(4)}
    result = check_model(model, batch, rounds=0)
    assert result.mixed_error is None and "does not end in a linear layer" in result.problems["multimix"]
    assert result.problems["erm"] == result.problems["mixup"] == ""

    with pytest.raises(ValueError, match="ViTForImageClassification cannot be trained on this batch without mixing"):
        check_model(digits.vit(), {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4)})


def test_slightly_nonlinear_head_has_no_mixed_error():
    model = digits.vit()

    class Bent(torch.nn.Linear):
        def forward(self, x):
            z = super().forward(x)
            return z + 0.02 * z.square()

    bent = Bent(32, 10)
    bent.load_state_dict(model.classifier.state_dict())
    inputs = {"pixel_values": torch.randn(6, 1, 8, 8)}
    assert mixed_error(model, inputs) < 1e-5
    model.classifier = bent
    assert mixed_error(model, inputs) is None


def test_check_model_restores_the_model():
    name = "MobileNetV2ForImageClassification"  # has batch norms, whose statistics a training step updates
    model = zoo.build(name).train()
    batch = batch_for(name, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    keys, state = set(model.__dict__), torch.get_rng_state()
    check_model(model, batch, rounds=1)
    assert torch.equal(torch.get_rng_state(), state) and set(model.__dict__) == keys
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def saved(model, directory, *others):
    for part in (model, *others):
        part.save_pretrained(directory)
    return str(directory)


def test_check_command_reports_and_sets_the_exit_code(tmp_path, capsys):
    sizes = {"size": {"height": 8, "width": 8}, "image_mean": [0.5], "image_std": [0.5], "do_convert_rgb": False}
    model = saved(digits.vit(), tmp_path / "vit", ViTImageProcessorPil(**sizes))
    assert main(["check", model, "--rounds", "1", "--batch_size", "4", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "dense_multimix trains this model." in output and "up to 16 per example, at the output of vit." in output
    assert (
        "logits computed from the locations equal the model's own" in output
        and "reads token[0], then classifier." in output
    )
    assert "auto selects 'cls'" in output and re.search(
        r"1,000 mixed features equal the mixed logits \(relative error \d", output
    )
    number = re.search(r"num_mixed='auto' selects ([\d,]+) per step, an expected ([\d.]+)% of the operations", output)
    assert number[1] == "32" and float(number[2]) > 3  # the smallest number, for a tiny model
    rows = dict(re.findall(r"^(\w+) +yes +([\d.]+)$", output, re.MULTILINE))
    assert set(rows) == set(default_methods()) and rows["erm"] == "1" and "pixel_values 4 x 1 x 8 x 8" in output

    perceiver = saved(zoo.build(MULTIMIX_ONLY, vocab_size=262), tmp_path / "perceiver")
    arguments = ["check", perceiver, "--rounds", "0", "--device", "cpu", "--task", "text"]
    assert main(arguments) == 1
    output = capsys.readouterr().out
    assert "dense_multimix does not train this model: Perceiver" in output and "Locations: none." in output
    assert main([*arguments, "--mixing", "multimix"]) == 0
    (tmp_path / "options.yaml").write_text("rounds: 0\ndevice: cpu\ntask: text\nmixing: multimix\n")
    assert main(["check", perceiver, str(tmp_path / "options.yaml")]) == 0

    assert "MODEL is missing" in command_error(capsys, "check")
    assert "did you mean multimix?" in command_error(capsys, "check", model, "--mixing", "mutimix")
    assert "--batch_size must be an integer of at least 2" in command_error(capsys, "check", model, "--batch_size", "1")
    assert "does not support text classification: choose another --task" in command_error(
        capsys, "check", model, "--task", "text"
    )
    assert "supports the tasks image and text: choose one with --task" in command_error(
        capsys, "check", perceiver_of_images(tmp_path)
    )
    assert "--num_train_epochs is not an option of mm-hf check:" in command_error(
        capsys, "check", model, "--num_train_epochs", "1"
    )


def perceiver_of_images(tmp_path):
    model = zoo.build(MULTIMIX_ONLY)
    model.config.architectures = None
    model.save_pretrained(tmp_path / "either")
    config = tmp_path / "either" / "config.json"
    config.write_text(config.read_text().replace(MULTIMIX_ONLY, "PerceiverModel"))
    return str(tmp_path / "either")


def test_example_batches_of_each_task(tmp_path):
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({w for s in SENTENCES for w in s.lower().split()}),
    ]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=16)
    name = saved(models.build("bert", vocab_size=200), tmp_path / "bert", tokenizer)
    assert detect_task(name) == "text"
    model, processor = load(name, "text")
    batch = example_batch(model, processor, "text", 4)
    assert batch["input_ids"].shape == (4, 16) and (batch["attention_mask"] == 0).any()
    torch.testing.assert_close(batch, example_batch(model, processor, "text", 4))
    assert not torch.equal(batch["labels"], example_batch(model, processor, "text", 4, seed=1)["labels"])
    bare = example_batch(model, None, "text", 4)
    assert (bare["attention_mask"].sum(1) >= 12).all() and (bare["input_ids"] < 200).all()

    for cls, extractor in (
        ("Wav2Vec2ForSequenceClassification", Wav2Vec2FeatureExtractor(return_attention_mask=True)),
        ("ASTForAudioClassification", ASTFeatureExtractor(num_mel_bins=32, max_length=64)),
    ):
        tiny = zoo.build(cls)
        name = saved(tiny, tmp_path / cls, extractor)
        assert detect_task(name) == "audio"
        model, processor = load(name, "audio")
        batch = example_batch(model, processor, "audio", 2)
        assert batch[model.main_input_name].shape[0] == 2 and batch["labels"].shape == (2,)
    with pytest.raises(ValueError, match="requires a feature extractor for input_features, but has none"):
        example_batch(zoo.build("WhisperForAudioClassification"), None, "audio", 2)

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1)
    assert example_batch(ViTForImageClassification(config), None, "image", 2)["labels"].shape == (2, 1)
    config.problem_type, config.num_labels = "multi_label_classification", 3
    assert example_batch(ViTForImageClassification(config), None, "image", 2)["labels"].dtype == torch.float32


def test_check_command_checks_audio_models(tmp_path, capsys):
    tiny = zoo.build("Wav2Vec2ForSequenceClassification", layerdrop=0.0)
    name = saved(tiny, tmp_path, Wav2Vec2FeatureExtractor(return_attention_mask=True, sampling_rate=2000))
    assert main(["check", name, "--rounds", "0", "--batch_size", "3", "--device", "cpu"]) == 0
    assert "auto selects 'gap', the similarity of a location's features" in capsys.readouterr().out


def test_supported_models_table_lists_the_zoo(capsys):
    rows = {row.name: row for row in table.supported_models()}
    assert set(rows) == set(zoo.class_names())
    assert {name: row.task for name, row in rows.items()} == zoo.TASKS
    for row in rows.values():
        assert row.multimix >= row.dense_multimix and bool(row.attention) >= row.dense_multimix
        assert row.dense_multimix or row.reason
    assert not rows[MULTIMIX_ONLY].dense_multimix and rows[MULTIMIX_ONLY].multimix
    assert sum(row.dense_multimix for row in rows.values()) == 182 and sum(row.multimix for row in rows.values()) == 186


def test_written_table_is_read_back(tmp_path):
    path = tmp_path / "table.csv"
    table.write_supported_models(table.supported_models(), path)
    assert path.read_text() == table.TABLE.read_text()


def test_models_command_lists_classes(capsys, monkeypatch):
    assert main(["models", "vit", "--task", "image", "--method", "dense_multimix"]) == 0
    output = capsys.readouterr().out
    listed = re.findall(r"^([\w./]+) +image +yes", output, re.MULTILINE)
    assert listed == [row.name for row in select(table.installed(), "vit", "image", "dense_multimix")]
    assert "ViTForImageClassification" in listed and "BertForSequenceClassification" not in output
    assert f"{len(listed)} classes: dense_multimix trains {len(listed)}" in output
    assert main(["models", "perceiver"]) == 0
    assert "PerceiverForSequenceClassification gives no per-location logits" in capsys.readouterr().out
    assert "did you mean bert?" in command_error(capsys, "models", "bret")
    assert "No class with 'vit' in its name matches --task audio" in command_error(
        capsys, "models", "vit", "--task", "audio"
    )
    assert "--task must be one of text, image, audio, video, got 'pictures'" in command_error(
        capsys, "models", "--task", "pictures"
    )
    new = table.SupportedModel("NewForImageClassification", "image", "new")
    monkeypatch.setattr("mm_hf.data.supported_models.installed", lambda: (*table.supported_models(), new))
    assert main(["models", "new"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^NewForImageClassification +image +- +- +-", output, re.MULTILINE)
    assert "Not tested: 1 (marked -), for want of a library or a newer Transformers." in output
