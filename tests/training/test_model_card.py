"""The model card: what it says is so, and the Hub takes its metadata."""

import builtins
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from mm_hf import ERM, CutMix, DenseMultiMix, Mixup, MultiMix, MultiMixTrainer
from mm_hf.training.model_card import (
    PLOT,
    PipelineTask,
    evaluations_table,
    final_evaluation,
    is_user_edited,
    method_section,
    pipeline_task,
    read_evaluations,
    result_rows,
    usage_example,
)
from tests.helpers import digits, models
from tests.helpers.hub_server import check_metadata

EXAMPLE = Path(__file__).parents[2] / "docs" / "example_model_card" / "README.md"
ALL = {
    "vit": "image-classification",
    "dinov2": "image-classification",
    "bert": "text-classification",
    "distilbert": "text-classification",
}


def trainer_of(directory, model=None, mixing=None, **settings):
    data = digits.dataset()
    return MultiMixTrainer(
        digits.vit() if model is None else model,
        digits.arguments(directory, **settings),
        mixing=mixing or DenseMultiMix(num_mixed=20),
        train_dataset=data,
        eval_dataset=data.select(range(40)),
        compute_metrics=lambda p: {"accuracy": 0.5, "f1": float("nan"), "recall_of_digit_7": 0.1},
    )


def card_of(trainer, **known):
    trainer.create_model_card(**known)
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert check_metadata(card.content) == []
    return card


def body(card):
    return re.sub(r"<!--.*?-->\s*", "", card.text, flags=re.DOTALL)


# ---- parts ----


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_task_is_that_of_transformers(name):
    assert pipeline_task(models.build(name)).name == ALL[name]


def test_the_task_of_models_that_no_pipeline_runs_is_open():
    assert pipeline_task(SimpleNamespace()) == PipelineTask(None, "SimpleNamespace")


def test_the_lines_of_use_fit_what_was_saved():
    image, text = PipelineTask("image-classification", "AutoModelForImageClassification"), PipelineTask("text-classification", "X")
    grey, colour = SimpleNamespace(num_channels=1), SimpleNamespace(num_channels=3)
    assert 'pipeline("image-classification", model="a/b")' in usage_example(image, "a/b", colour, object())
    assert 'pipeline("text-classification", model="a/b")' in usage_example(text, "a/b", SimpleNamespace(), object())
    assert "pipeline" not in usage_example(image, "a/b", grey, object()) and '.convert("L")' in usage_example(
        image, "a/b", grey, object()
    )
    pixels = usage_example(Task("image-segmentation", "X"), "a/b", grey, object())
    assert "pipeline" not in pixels and "print(logits.argmax(1))" in pixels
    for task in (image, text):
        lines = usage_example(task, "a/b", colour)
        assert f'{task.auto_class}.from_pretrained("a/b")' in lines and "no processor was saved" in lines
        compile(lines, "card", "exec")


HISTORY = [
    {"step": 1, "loss": 2.0},
    {"step": 2, "eval_loss": 1.5, "eval_accuracy": 0.4, "eval_runtime": 3.0, "epoch": 1.0},
    {"step": 3, "loss": 1.0},
    {"step": 4, "eval_loss": 1.7, "eval_accuracy": 0.3, "eval_steps_per_second": 3.0},
]
END = [{"step": 4, "train_runtime": 9.0, "train_loss": 1.5}]


def test_evaluations_are_read_from_the_log():
    assert read_evaluations(HISTORY + END) == [
        {"step": 2, "training loss": 2.0, "validation loss": 1.5, "accuracy": 0.4},
        {"step": 4, "training loss": 1.0, "validation loss": 1.7, "accuracy": 0.3},
    ]
    # Several data sets at one step.
    both = [{"step": 2, "eval_a_loss": 1.0}, {"step": 2, "eval_b_loss": 2.0}]
    assert read_evaluations(both) == [{"step": 2, "a_loss": 1.0, "b_loss": 2.0}]


def test_the_results_are_those_of_the_weights_that_are_pushed():
    last, best = (
        {"step": 4, "validation loss": 1.7, "accuracy": 0.3},
        {"step": 2, "validation loss": 1.5, "accuracy": 0.4},
    )
    assert final_evaluation(HISTORY) == last
    assert final_evaluation(HISTORY + END) == last
    assert final_evaluation(HISTORY + END, best_step=2) == best
    afterwards = {"step": 4, "eval_accuracy": 0.9}
    assert final_evaluation([*HISTORY, *END, afterwards], best_step=2) == {"step": 4, "accuracy": 0.9}
    assert final_evaluation([]) == {} == final_evaluation(END)


def test_a_table_has_all_columns():
    assert table([{"a": 1, "b": 0.5}, {"a": "x|y", "c": 2}]).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1 | 0.5000 |  |",
        "| x\\|y |  | 2 |",
    ]


def test_a_method_is_told_with_all_its_settings():
    text = method_section(DenseMultiMix(num_mixed="auto", alpha=(0.5, 2.0)), num_mixed=321)
    assert "| `alpha` | [0.5, 2.0] |" in text and "| `num_mixed` | auto |" in text and "| `num_mixed` | 321 |" in text
    for mixing in (DenseMultiMix(), MultiMix(), Mixup(), CutMix()):
        told = re.findall(r"^\| `(\w+)` \|", method_section(mixing), flags=re.MULTILINE)
        assert told == [name for name in mixing.to_dict() if name != "method"]
    assert "No mixing" in method_section(ERM())


# ---- whole cards ----


def test_a_card_before_anything_was_measured(tmp_path):
    card = card_of(trainer_of(tmp_path / "mine"))
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert {"dense-multimix", "multimix", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.eval_results is None and "## Results" not in card.text
    assert "2311.05538" in card.text and "venkataramanan2023embedding" in card.text
    assert "A `ViTForImageClassification`, trained from scratch with DenseMultiMix (mm_hf)." in card.text


def test_a_card_of_a_training(tmp_path):
    """Real numbers, the metadata read back by the client, a picture; and local paths that stay here."""
    place = tmp_path / "users" / "ann" / "pictures"
    place.mkdir(parents=True)
    model = digits.vit(id2label={i: f"digit {i}" for i in range(10)}, label2id={f"digit {i}": i for i in range(10)})
    trainer = trainer_of(tmp_path / "mine", model, max_steps=3, eval_strategy="steps", eval_steps=1, bf16=True)
    trainer.train()
    known = {"dataset": str(place), "dataset_tags": str(place), "finetuned_from": str(tmp_path / "users" / "base")}
    card = card_of(trainer, **known, language="en", license="mit", tags="mine")
    assert card.data.language == "en" and card.data.license == "mit" and card.data.tags[0] == "mine"
    assert card.data.datasets is None and card.data.base_model is None  # no names of the Hub
    (result,) = card.data.eval_results  # without what is no number, and what is of one class
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.5, "pictures")
    assert card.data.metrics == ["accuracy"]
    text = body(card)
    assert (
        str(tmp_path / "users") not in text and "on the data set pictures," in text and "fine-tuned from `base`" in text
    )
    assert "Its 10 classes: `digit 0`, `digit 1`" in text and "- mixed_precision_training: bfloat16" in text
    assert "Of the evaluation set (40 examples), at step 3:" in text and "| accuracy | 0.5000 |" in text
    assert "| f1 | nan |" in text and "| recall_of_digit_7 | 0.1000 |" in text
    assert len(re.findall(r"^\| [123] \| ", text, flags=re.MULTILINE)) == 3
    assert f"]({PLOT})" in text and Image.open(tmp_path / "mine" / PLOT).size[0] > 1000
    # A second one takes the place of the first and knows what it was told.
    trainer.create_model_card(**trainer._card)
    assert ModelCard.load(tmp_path / "mine" / "README.md").content == card.content


def test_names_of_the_hub_are_linked(tmp_path):
    trainer = trainer_of(tmp_path / "mine")
    trainer.state.log_history = [{"step": 1, "eval_accuracy": 0.25}]
    card = card_of(trainer, dataset_tags="ylecun/mnist", dataset="MNIST", finetuned_from="google/vit-base-patch16-224")
    assert card.data.datasets == ["ylecun/mnist"] and card.data.base_model == "google/vit-base-patch16-224"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_name, result.task_type) == (
        "ylecun/mnist",
        "MNIST",
        "image-classification",
    )
    assert "[google/vit-base-patch16-224](https://huggingface.co/google/vit-base-patch16-224)" in card.text


def test_long_trainings_have_short_tables(tmp_path):
    trainer = trainer_of(tmp_path / "mine")
    trainer.state.log_history = [{"step": step, "eval_accuracy": 0.5} for step in range(1, 101)]
    text = body(card_of(trainer))
    steps = re.findall(r"^\| (\d+) \| 0.5", text, flags=re.MULTILINE)
    assert len(steps) == 25 and steps[-1] == "100" and "Evaluations, one in 4" in text


def test_without_matplotlib_the_tables_are_left(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, globals=None, locals=None, names=(), level=0):
        if name == "analysis" and level:
            raise ImportError("No module named 'matplotlib'")
        return imported(name, globals, locals, names, level)

    trainer = trainer_of(tmp_path / "mine")
    trainer.state.log_history = HISTORY
    monkeypatch.setattr(builtins, "__import__", without)
    text = body(card_of(trainer))
    assert PLOT not in text and "| accuracy | 0.3000 |" in text


def test_the_card_of_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    trainer = trainer_of(tmp_path / "mine", peft.get_peft_model(digits.vit(), config), label_names=["labels"])
    trainer.save_model()  # PEFT writes a draft of its own
    assert not is_user_edited(tmp_path / "mine" / "README.md")
    card = card_of(trainer)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "image-classification"
    assert {"dense-multimix", "multimix", "lora"} <= set(card.data.tags)
    assert "An adapter (PEFT) of a `ViTForImageClassification`" in card.text and "plain Transformers" not in card.text


def test_another_method_takes_its_tags_along(tmp_path):
    card_of(trainer_of(tmp_path / "mine", mixing=Mixup()), tags="mine")
    card = card_of(trainer_of(tmp_path / "mine", mixing=MultiMix(num_mixed=5)))
    assert set(card.data.tags) == {"multimix", "mine", "generated_from_trainer"}


def test_a_card_is_a_persons_once_the_comment_is_gone(tmp_path):
    trainer = trainer_of(tmp_path / "mine")
    path = tmp_path / "mine" / "README.md"
    assert not is_user_edited(path)
    card = card_of(trainer)
    assert not is_user_edited(path)
    card.text = body(card) + "\nFor digits of postal codes only.\n"
    card.save(path)
    assert is_user_edited(path)
    trainer.create_model_card()
    assert "postal codes" in path.read_text()


# ---- the one in the documentation ----


def test_the_example_in_the_documentation_is_a_card_as_it_is_written_now(tmp_path):
    """Its figures are those of the command in docs/hub.md; all else is compared with a card made here."""
    shown = ModelCard.load(EXAMPLE)
    assert check_metadata(shown.content) == [] and Image.open(EXAMPLE.parent / PLOT).size[0] > 1000
    now = trainer_of(tmp_path / "digits", mixing=DenseMultiMix())
    now.state.log_history = [{"step": s, "loss": 1.0 / s, "eval_accuracy": 0.5} for s in (1, 2)]
    card = card_of(now, dataset="digits")
    headings = [re.findall(r"^#+ .*|^<summary>.*", body(c), flags=re.MULTILINE) for c in (shown, card)]
    assert headings[0] == headings[1]
    assert method_section(DenseMultiMix()) in shown.content
    assert set(shown.data.to_dict()) == set(card.data.to_dict())
    assert shown.data.pipeline_tag == "image-classification" and shown.data.eval_results
