"""Small data and models under the names that the documentation uses, so that its code and commands run as written."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification as AutoModel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    DefaultFlowCallback,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    default_data_collator,
    get_constant_schedule,
)

from mm_hf import MultiMixTrainer
from mm_hf.cli import main
from mm_hf.comparison import as_methods, run_comparison
from mm_hf.data import offline
from mm_hf.data.images import ImageTransform
from tests.helpers.scripts import run_script

VIT, MODERNBERT = "google/vit-base-patch16-224-in21k", "answerdotai/ModernBERT-base"
CLASSES = ["angular_leaf_spot", "bean_rust", "healthy"]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
ARGUMENTS = {"per_device_train_batch_size": 8, "disable_tqdm": True, "use_cpu": True}
# Commands that are not run, by their first word.
ELSEWHERE = {
    "make": "test_packaging.py, test_docker.py and .ci/run run targets",
    "pip": "installs packages",
    "apt-get": "installs packages",
    "pytest": "tests",
    "accelerate": "tests/distributed starts processes",
    "torchrun": "tests/distributed starts processes",
    "ACCELERATE_USE_CPU=true": "tests/distributed starts processes",
    "DS_BUILD_OPS=0": "installs packages",
    "tensorboard": "a server",
}
MISSING_DATA = ("spoken_prompts", "cifar100", "mrpc")  # Debian packages and the Hub; tests/end_to_end has stand-ins


def leaves(rows: int, label: str = "label", side: int = 20) -> Dataset:
    """Images of noise in three classes."""
    random = np.random.default_rng(0)
    images = [PILImage.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(rows)]
    columns = {"image": images, label: [i % 3 for i in range(rows)]}
    return Dataset.from_dict(columns, Features({"image": Image(), label: ClassLabel(names=CLASSES)}))


def write_files() -> None:
    """Write models and data to the working directory. A directory has the name of the model on the Hub."""
    vit = ViTConfig(**TINY, image_size=16, patch_size=8)
    ViTModel(vit).save_pretrained(VIT)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(VIT)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    bert = BertConfig(**TINY, vocab_size=len(words), max_position_embeddings=64, num_labels=2)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=64)
    for name in (MODERNBERT, "minilm_files"):
        BertForSequenceClassification(bert).save_pretrained(name)
        tokenizer.save_pretrained(name)
    beans = Path("AI-Lab-Makerere/beans")
    beans.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        leaves(12, "labels").to_parquet(beans / f"{split}.parquet")
        for i, row in enumerate(leaves(8)):
            folder = Path("flowers", split, "daisy" if row["label"] else "rose")
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{i}.jpg")
        Path(f"{split}.csv").write_text("text,label\n" + "good film,1\nbad film,0\n" * 8)
    Path("shards").mkdir()
    for file in ("train-0.parquet", "shards/train-0.parquet"):
        leaves(16).to_parquet(file)
    Path("photos").mkdir()
    for file in ("picture.png", "photos/1.png"):
        leaves(1)[0]["image"].save(file)
    variables = StandIns()
    variables["args"] = TrainingArguments("user/name", **ARGUMENTS, max_steps=1, save_steps=1)
    trainer = variables._get("trainer")
    trainer.train()
    trainer.save_model()
    Path("user/name/checkpoint-1").rename("user/name/last-checkpoint")


class StandIns(dict):
    """Variables that a page uses without a definition, created at their first use."""

    def make__init__(self) -> None:
        super().__init__(__name__="__main__")

    def provide(self, code: str) -> None:
        """Define the variables of a block that have a stand-in and no value yet."""
        for name in re.findall(r"\b[a-z]\w*\b", code):
            if name not in self and hasattr(self, f"make_{name}"):
                self[name] = getattr(self, f"make_{name}")()

    def _get(self, name: str):
        self.provide(name)
        return self[name]

    def make_name(self):
        return VIT

    def make_processor(self):
        return ViTImageProcessorPil.from_pretrained(VIT)

    def make_model(self):
        torch.manual_seed(0)
        return AutoModel.from_pretrained(VIT, num_labels=3)

    def make_args(self):
        return TrainingArguments("outputs/page", **ARGUMENTS)

    make_training_args = make_args

    def make_train(self):
        return list(leaves(16).with_transform(ImageTransform(self._get("processor"))))

    make_test = make_validation = make_eval_dataset = make_train

    def make_data(self):
        return DatasetDict(train=leaves(16))

    def make_stream(self):
        return leaves(16).to_iterable_dataset()

    def make_output_dir(self):
        return "outputs/page"

    make_directory = make_output_dir

    def make_epoch(self):
        return 0

    def make_trainer(self):
        return MultiMixTrainer(
            self._get("model"), self._get("args"), train_dataset=self._get("train"),
            processing_class=self._get("processor"),
        )  # fmt: skip

    def make_accelerator(self):
        return Accelerator()

    def make_loader(self):
        return DataLoader(self._get("train"), batch_size=8, collate_fn=default_data_collator)

    make_eval_loader = make_loader

    def make_optimizer(self):
        return torch.optim.AdamW(self._get("model").parameters())

    def make_scheduler(self):
        return get_constant_schedule(self._get("optimizer"))

    def make_images(self):
        return torch.rand(4, 3, 16, 16)

    def make_labels(self):
        return torch.tensor([0, 1, 2, 0])


def shorten(patch) -> None:
    """Stop each training after two steps, read few rows of the offline datasets, and compare two runs."""
    on_step_end = DefaultFlowCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        control = on_step_end(self, args, state, control, **kwargs)
        control.should_training_stop |= state.global_step >= 2
        return control

    patch.setattr(DefaultFlowCallback, "on_step_end", stop)

    def compare_two(task, methods, seeds, *args, **settings):
        return run_comparison(task, dict(list(as_methods(methods).items())[:2]), 1, *args, **settings)

    patch.setattr("mm_hf.comparison.run_comparison", compare_two)
    patch.setattr("mm_hf.comparison.report.write.draw_figures", lambda *_: {})  # takes most of the time
    patch.setattr("mm_hf.cli.scripts.text.resolve", lambda name: "minilm_files" if name == "minilm" else name)
    digits = DatasetDict(
        {split: rows.select(range(64 if split == "train" else 24)) for split, rows in offline.load_digits().items()}
    )

    def large(row):
        return {"image": row["image"].resize((28, 28))}

    texts = load_dataset("csv", data_files={"train": "train.csv", "test": "test.csv"})
    texts = texts.cast_column("label", ClassLabel(names=["negative", "positive"]))
    data = {"digits": digits, "fashion_mnist": digits.map(large), "movie_reviews": texts}
    for tables in (offline.OFFLINE_IMAGES, offline.OFFLINE_TEXTS, offline.OFFLINE):
        for name in set(tables) & set(data):
            patch.setitem(tables, name, lambda name=name: data[name].with_format(None))  # a copy, which scripts change
    import run_text_classification as script

    patch.setitem(script.OFFLINE, "movie_reviews", lambda: texts)
    docs = texts.map(lambda row: {"sentence1": row["text"], "sentence2": row["text"]}, remove_columns="text")
    docs = docs.cast_column("label", ClassLabel(names=["other", "same"]))
    patch.setitem(script.OFFLINE, "stdlib_docs", lambda: DatasetDict(train=docs["train"], validation=docs["test"]))


def commands_in(block: str) -> list[str]:
    """Return the commands of a block of a page, with continued lines joined; none if it is the output of a command."""
    lines = block.replace("\\\n", "").splitlines()
    shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    first = r"(?:[A-Z_]+=\S+ )*(?:mm-hf|python|printf|cat|" + "|".join(ELSEWHERE) + ") "
    return shown or ([line for line in lines if line] if lines and re.match(first, lines[0]) else [])


def run_command(command: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it prints."""
    words = shlex.split(command, comments=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if words[0] == "mm-hf":
            code = main(words[1:])
        elif words[0] == "python":
            recipe = [Path(__file__).parents[2] / word if word.endswith(".yaml") else word for word in words[2:]]
            code = run_script(Path(words[1]).stem, *recipe) and 0
        else:
            done = subprocess.run(command, shell=True, capture_output=True, text=True)
            code = done.returncode
            print(done.stdout, done.stderr)
    return code or 0, out.getvalue()
