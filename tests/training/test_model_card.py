"""The model card: its content is correct, names are escaped, and the Hub accepts its metadata."""

import ast
import builtins
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from mm_hf import ERM, CutMix, DenseMultiMix, Mixup, MultiMix, MultiMixTrainer
from mm_hf.evaluation.metrics import METRICS, MetricInfo, register_metric
from mm_hf.training.history import evaluations_table, final_evaluation, read_evaluations, result_rows
from mm_hf.training.model_card import (
    PLOT,
    PipelineTask,
    is_user_edited,
    method_section,
    pipeline_task,
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


def test_a_model_without_a_pipeline_has_no_task_name():
    assert pipeline_task(SimpleNamespace()) == PipelineTask(None, "SimpleNamespace")


def test_the_usage_example_depends_on_what_was_saved():
    image = PipelineTask("image-classification", "AutoModelForImageClassification")
    text = PipelineTask("text-classification", "X")
    gray, color = SimpleNamespace(num_channels=1), SimpleNamespace(num_channels=3)
    assert 'pipeline("image-classification", model="a/b")' in usage_example(image, "a/b", color, object())
    assert 'pipeline("text-classification", model="a/b")' in usage_example(text, "a/b", SimpleNamespace(), object())
    lines = usage_example(image, "a/b", gray, object())
    assert "pipeline" not in lines and '.convert("L")' in lines
    pixels = usage_example(PipelineTask("image-segmentation", "X"), "a/b", gray, object())
    assert "pipeline" not in pixels and "print(logits.argmax(1))" in pixels
    for task in (image, text):
        lines = usage_example(task, "a/b", color)
        assert f'{task.auto_class}.from_pretrained("a/b")' in lines and "no processor was saved" in lines
        ast.parse(lines)


def test_names_in_the_usage_example_are_python_literals():
    name = 'C:\\new "runs"\n'
    for processor in (None, object()):
        for channels in (1, 3):
            task = PipelineTask("image-classification", "AutoModel")
            tree = ast.parse(usage_example(task, name, SimpleNamespace(num_channels=channels), processor))
            assert name in {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


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
    # Several datasets at one step.
    both = [{"step": 2, "eval_a_loss": 1.0}, {"step": 2, "eval_b_loss": 2.0}]
    assert read_evaluations(both) == [{"step": 2, "a_loss": 1.0, "b_loss": 2.0}]


def test_the_final_evaluation_is_that_of_the_pushed_weights():
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


def test_registered_metrics_come_first_and_in_the_format_of_the_registry():
    evaluation = {"step": 2, "zeta": 0.5, "macro_f1": 0.25, "validation loss": 1.5, "accuracy": 0.5, "count": 3}
    assert result_rows(evaluation) == [
        ("Validation loss", "1.5000"),
        ("Accuracy (%)\u00a0↑", "50.00"),
        ("Macro F1 (%)\u00a0↑", "25.00"),
        ("Zeta", "0.5000"),
        ("Count", "3"),
    ]


def test_a_newly_registered_metric_appears_in_cards():
    register_metric(MetricInfo("top2", "top-2 accuracy", "%", 100, 1, "higher"))
    try:
        assert result_rows({"top2": 0.875}) == [("Top-2 accuracy (%)\u00a0↑", "87.5")]
    finally:
        del METRICS["top2"]


def test_a_table_of_evaluations_has_the_metrics_of_all_rows():
    assert evaluations_table([{"step": 1, "nll": 0.5}, {"step": 2, "a|b": 2.0}]).splitlines() == [
        "| Step | NLL (nats)\u00a0↓ | A\\|b |",
        "| ---: | ---: | ---: |",
        "| 1 | 0.500 |  |",
        "| 2 |  | 2.0000 |",
    ]


def test_the_method_section_lists_all_settings():
    text = method_section(DenseMultiMix(num_mixed="auto", alpha=(0.5, 2.0)), num_mixed=321)
    assert "| `alpha` | `[0.5, 2.0]` |" in text and "| `num_mixed` | `auto` |" in text and "| `321` |" in text
    for mixing in (DenseMultiMix(), MultiMix(), Mixup(), CutMix()):
        listed = re.findall(r"^\| `(\w+)` \|", method_section(mixing), flags=re.MULTILINE)
        assert listed == [name for name in mixing.to_dict() if name != "method"]
    assert method_section(ERM()).startswith("## Method\n\n") and "|" not in method_section(ERM())


# ---- complete cards ----


def test_a_card_without_evaluations_has_no_results(tmp_path):
    card = card_of(trainer_of(tmp_path / "mine"))
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert {"dense-multimix", "multimix", "generated_from_trainer"} <= set(card.data.tags)
    assert card.data.eval_results is None and "## Results" not in card.text
    assert "2311.05538" in card.text and "venkataramanan2023embedding" in card.text
    assert "A `ViTForImageClassification`, trained from scratch with DenseMultiMix (mm_hf)." in card.text


def test_a_card_after_training_has_results_and_no_local_paths(tmp_path):
    place = tmp_path / "users" / "ann" / "pictures"
    place.mkdir(parents=True)
    model = digits.vit(id2label={i: f"digit {i}" for i in range(10)}, label2id={f"digit {i}": i for i in range(10)})
    trainer = trainer_of(tmp_path / "mine", model, max_steps=3, eval_strategy="steps", eval_steps=1, bf16=True)
    trainer.train()
    known = {"dataset": str(place), "dataset_tags": str(place), "finetuned_from": str(tmp_path / "users" / "base")}
    card = card_of(trainer, **known, language="en", license="mit", tags="mine")
    assert card.data.language == "en" and card.data.license == "mit" and card.data.tags[0] == "mine"
    assert card.data.datasets is None and card.data.base_model is None  # not names on the Hub
    (result,) = card.data.eval_results  # without the metric that is NaN and that of one class
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.5, "pictures")
    assert card.data.metrics == ["accuracy"]
    text = body(card)
    assert (
        str(tmp_path / "users") not in text
        and "on the dataset pictures with DenseMultiMix" in text
        and "fine-tuned from `base`" in text
    )
    assert "It has 10 classes: `digit 0`, `digit 1`" in text and "- mixed_precision_training: bfloat16" in text
    assert (
        "Results on the evaluation set (40 examples) at step 3:" in text and "| Accuracy (%)\u00a0↑ | 50.00 |" in text
    )
    assert "| F1 (%)\u00a0↑ | nan |" in text and "| Recall of digit 7 | 0.1000 |" in text
    assert len(re.findall(r"^\| [123] \| ", text, flags=re.MULTILINE)) == 3
    assert f"]({PLOT})" in text and Image.open(tmp_path / "mine" / PLOT).size[0] > 1000
    # The card of a later checkpoint has the same arguments.
    trainer.create_model_card(**trainer._card)
    assert ModelCard.load(tmp_path / "mine" / "README.md").content == card.content


def test_a_card_reports_the_test_set_first(tmp_path):
    trainer = trainer_of(tmp_path / "mine", max_steps=1, eval_strategy="steps", eval_steps=1)
    trainer.train()
    trainer.compute_metrics = lambda p: {"accuracy": 0.75}
    trainer.evaluate(digits.dataset(500, 530), metric_key_prefix="test")
    card = card_of(trainer, dataset="digits")
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_split) == (0.75, "test")
    results = re.findall(r"^Results on the (.*):$", card.text, flags=re.MULTILINE)
    assert results == ["test set (30 examples) at step 1", "evaluation set (40 examples) at step 1"]
    assert card.text.index("| Accuracy (%)\u00a0↑ | 75.00 |") < card.text.index("| Accuracy (%)\u00a0↑ | 50.00 |")
    assert "| Test loss |" in card.text


@pytest.mark.parametrize("absolute", [True, False])
def test_a_card_does_not_contain_the_directories_of_the_machine(tmp_path, monkeypatch, absolute):
    monkeypatch.chdir(tmp_path)
    trainer = trainer_of(tmp_path / "users" / "mine" if absolute else "users/mine", max_steps=1)
    trainer.train()
    card = card_of(trainer)
    assert str(tmp_path) not in card.content
    assert f'from_pretrained("{"mine" if absolute else "users/mine"}")' in card.text


@pytest.mark.parametrize("pushed", [False, True])
@pytest.mark.parametrize("base", ["outputs", "google/vit", "/tmp", None])
def test_the_hub_is_asked_for_the_license_only_on_a_push_and_for_names_on_the_hub(tmp_path, monkeypatch, base, pushed):
    asked = []

    class Api:
        def model_info(self, name):
            asked.append(name)
            return SimpleNamespace(tags=["license:mit"])

    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    monkeypatch.setattr("transformers.modelcard.hf_api", Api)
    monkeypatch.setattr("transformers.modelcard.is_offline_mode", lambda: False)
    trainer = trainer_of(tmp_path / "mine")
    trainer.hub_model_id = "ann/mine" if pushed else None
    trainer.model.config._name_or_path = base or ""
    for known in ({}, {"finetuned_from": base}):
        card = card_of(trainer, **known)
        assert card.data.license == ("mit" if pushed and base == "google/vit" else None)
    assert set(asked) == ({"google/vit"} if pushed and base == "google/vit" else set())


def test_names_on_the_hub_are_linked(tmp_path):
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


UNUSUAL = "<b>x</b> *y* | `z` [l](http://example.org) # &amp;:\n---\n"
SHOWN = UNUSUAL.replace("\n", " ").strip()


def test_names_are_escaped(tmp_path):
    model = digits.vit(id2label={i: f"{i} {UNUSUAL}" for i in range(10)})
    trainer = trainer_of(tmp_path / "a *b* [c](d) #", model)
    trainer.state.log_history = [{"step": s, f"eval_{UNUSUAL}": 0.5, "eval_accuracy": 0.5} for s in (1, 2)]
    card = card_of(trainer, dataset=UNUSUAL.replace("/", ""), finetuned_from=UNUSUAL.replace("/", ""), tags=UNUSUAL)
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    children = [child for token in tokens for child in token.children or []]
    text = "".join(child.content for child in children)
    assert "a *b* [c](d) #" in text and f"9 {SHOWN}" in text and SHOWN.replace("/", "") in text
    assert not {"html_inline", "em_open", "strong_open"} & {child.type for child in children}
    targets = [child.attrs["href"] for child in children if child.type == "link_open"]
    assert targets == ["https://arxiv.org/abs/2311.05538"]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[1:] == ["Usage", "Results", "Method", "Training", "Citation"]
    metadata = yaml.safe_load(card.content.split("\n---\n")[0].removeprefix("---\n"))
    assert UNUSUAL in metadata["tags"] and metadata["model-index"][0]["name"] == "a *b* [c](d) #"
    for token in tokens:
        if token.type == "fence" and token.info == "python":
            ast.parse(token.content)


def test_the_table_of_a_long_training_has_at_most_25_rows(tmp_path):
    trainer = trainer_of(tmp_path / "mine")
    trainer.state.log_history = [{"step": step, "eval_accuracy": 0.5} for step in range(1, 101)]
    text = body(card_of(trainer))
    steps = re.findall(r"^\| (\d+) \| 50", text, flags=re.MULTILINE)
    assert len(steps) == 25 and steps[-1] == "100" and "Evaluations, one in 4" in text


def test_a_card_without_matplotlib_has_no_plot(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, globals=None, locals=None, names=(), level=0):
        if name == "evaluation.plots" and level:
            raise ImportError("No module named 'matplotlib'")
        return imported(name, globals, locals, names, level)

    trainer = trainer_of(tmp_path / "mine")
    trainer.state.log_history = HISTORY
    monkeypatch.setattr(builtins, "__import__", without)
    text = body(card_of(trainer))
    assert PLOT not in text and "| Accuracy (%)\u00a0↑ | 30.00 |" in text


def test_the_card_of_an_adapter_replaces_the_draft_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    trainer = trainer_of(tmp_path / "mine", peft.get_peft_model(digits.vit(), config), label_names=["labels"])
    trainer.save_model()  # PEFT writes a draft
    assert not is_user_edited(tmp_path / "mine" / "README.md")
    card = card_of(trainer)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "image-classification"
    assert {"dense-multimix", "multimix", "lora"} <= set(card.data.tags)
    assert "An adapter (PEFT) of a `ViTForImageClassification`" in card.text and "plain Transformers" not in card.text


def test_the_tags_of_a_previous_method_are_removed(tmp_path):
    card_of(trainer_of(tmp_path / "mine", mixing=Mixup()), tags="mine")
    card = card_of(trainer_of(tmp_path / "mine", mixing=MultiMix(num_mixed=5)))
    assert set(card.data.tags) == {"multimix", "mine", "generated_from_trainer"}


def test_a_card_without_the_comment_is_kept(tmp_path):
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


# ---- the example in the documentation ----


def test_the_example_in_the_documentation_is_up_to_date(tmp_path):
    """Its results are those of the command in docs/hub.md; the rest is compared with a card made here."""
    shown = ModelCard.load(EXAMPLE)
    assert check_metadata(shown.content) == [] and Image.open(EXAMPLE.parent / PLOT).size[0] > 1000
    now = trainer_of(tmp_path / "digits", mixing=DenseMultiMix())
    now.state.log_history = [{"step": s, "loss": 1.0 / s, "eval_accuracy": 0.5} for s in (1, 2)]
    card = card_of(now, dataset="digits")
    headings = [re.findall(r"^#+ .*|^<summary>.*", body(c), flags=re.MULTILINE) for c in (shown, card)]
    assert headings[0] == headings[1]
    assert method_section(DenseMultiMix(), num_mixed=200).strip() in shown.content
    assert set(shown.data.to_dict()) == set(card.data.to_dict())
    assert shown.data.pipeline_tag == "image-classification" and shown.data.eval_results
