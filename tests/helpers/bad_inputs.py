"""Bad inputs of docs/errors.md: each is run as written, in a directory of small files, and ends in one message.

`docs/tools/errors.py` writes the page, and tests/repository/test_errors_page.py checks every case.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SMALL = "num_channels=1,image_size=8,patch_size=4,hidden_size=16,num_hidden_layers=1,num_attention_heads=2"
VIT = f"--model_type vit --config_overrides {SMALL},intermediate_size=16"

CASES: dict[str, list[str]] = {
    "Command line": [
        "mm-hf trian",
        "mm-hf train --num_mixd 100",
        "mm-hf train images",
        "mm-hf train --mixing mixupp",
        "mm-hf train --mixing mixup --num_mixed 100",
        "mm-hf train --num_mixed -3",
        "mm-hf train --num_mixed many",
        "mm-hf train --alpha 0",
        "mm-hf train --effective_examples 1",
        "mm-hf train --effective_examples 3 --alpha 0.5 --dataset_name digits --model_type vit",
        "mm-hf train --attention best",
        "mm-hf train --confidence_weighted maybe",
        "mm-hf train --mixing transmix --attention_share 2",
        "mm-hf train --mixing recursivemix --max_area -1",
        "mm-hf train --learning_rate fast",
        "mm-hf train --num_train_epochs",
        "mm-hf train --lr_scheduler_type line",
        "mm-hf train --eval_strategy sometimes",
        "mm-hf train --bf16 maybe",
        "mm-hf train --augmentation flip",
        "mm-hf train --max_train_samples 0",
        "mm-hf train --train_val_split 1.5",
        "mm-hf train missing.yaml",
        "mm-hf train list.yaml",
        "mm-hf train broken.yaml",
        "mm-hf train --model_type vit",
        "mm-hf train --dataset_name digits",
        "mm-hf train --dataset_name digits --model_type vat",
        "mm-hf train --dataset_name digits --model_type vit --config_overrides hidden_size",
        "mm-hf train --dataset_name digits --model_type vit --config_overrides {depths:}",
        "mm-hf train --dataset_name digits --model_type vit --config_overrides hiden_size=64",
        "mm-hf train --dataset_name digits --model_type vit --config_overrides hidden_size=big",
        "mm-hf train --dataset_name digits --model_type bert --tokenizer_name ./missing",
        "mm-hf train --dataset_name digits --model_name_or_path ./missing",
        "mm-hf train --dataset_name digits --model_type vit --ood_dataset_name digits",
        "mm-hf train --dataset_name digits --model_type vit --resume_from_checkpoint nowhere",
        "mm-hf train --dataset_name digits --model_type vit --log_level loud",
        "mm-hf train --dataset_name digits --model_type vit --report_to tensorbord",
        "mm-hf train --dataset_name digits --model_type vit --do_eval no",
        "mm-hf compare --methods erm mixupp",
        "mm-hf compare --methods multimix:num_mixd=3",
        "mm-hf compare --methods multimix:num_mixed",
        "mm-hf compare --methods mixup:alpha=-1",
        "mm-hf compare --methods dense_multimix:confidence_weighted=maybe",
        "mm-hf compare --methods erm --baseline plain",
        "mm-hf compare --seeds many",
        "mm-hf compare --seed 3",
        "mm-hf compare --keep_models some",
        "mm-hf analyze --dataset_name digits",
        "mm-hf analyze ./missing --dataset_name digits",
        "mm-hf check",
        "mm-hf check vit --batch_size 1",
        "mm-hf check vit --task text",
        "mm-hf models resnetx",
        "mm-hf models --task movie",
    ],
    "Settings of methods": [
        "DenseMultiMix(num_mixed=0)",
        "DenseMultiMix(num_mixed=2.5)",
        "DenseMultiMix(alpha=0.0)",
        "DenseMultiMix(alpha=[])",
        "DenseMultiMix(alpha=(2.0, 1.0))",
        "DenseMultiMix(alpha=1.0, effective_examples=3)",
        "DenseMultiMix(effective_examples='3')",
        "DenseMultiMix(examples_per_mix=1)",
        "DenseMultiMix(examples_per_mix=3)",
        "DenseMultiMix(input_mixing='cut')",
        "DenseMultiMix(input_mixing_prob=True)",
        "DenseMultiMix(input_mixing_start=-1)",
        "DenseMultiMix(min_fit=1.5)",
        "DenseMultiMix(clean_weight=0.0, min_fit=0.37)",
        "DenseMultiMix(clean_weight=float('inf'))",
        "DenseMultiMix(clean_weight=0.0, dense_weight=0.0)",
        "DenseMultiMix(attention='best')",
        "DenseMultiMix(detach_attention='yes')",
        "DenseMultiMix(preset=[])",
        "Mixup(alpha='1')",
        "TransMix(attention_share=None)",
        "RecursiveMix(consistency_weight=-1)",
        "get_method('mixmax')",
        "Mixing.from_dict({'method': 'multimix', 'num_mixd': 3})",
        "load_mixing('vit')",
    ],
    "Losses": [
        "multimix_loss(logits, labels, -factors)",
        "multimix_loss(logits, labels, 2 * factors)",
        "multimix_loss(logits, labels, factors[:, :0])",
        "multimix_loss(logits, labels + 1, factors)",
        "multimix_loss(logits, labels.float(), factors)",
        "multimix_loss(logits, -soft_labels, factors)",
        "multimix_loss(logits, 3 * soft_labels, factors)",
        "multimix_loss(logits.long(), labels, factors)",
        "multimix_loss(logits[:0], labels[:0], factors[:0])",
        "multimix_loss(logits, labels, factors, criterion='hinge')",
        "multimix_loss(logits, labels, factors, label_smoothing=-3)",
        "dense_multimix_loss(token_logits, labels, -attention, factors)",
        "dense_multimix_loss(token_logits, labels, attention / 0, factors)",
        "sample_factors(4, 8, 1e-31)",
    ],
    "Data": [
        f"mm-hf train --train_dir missing {VIT}",
        f"mm-hf train --train_dir empty --test_dir empty {VIT}",
        f"mm-hf train --train_dir flat --test_dir flat {VIT}",
        f"mm-hf train --train_dir images/train {VIT}",
        f"mm-hf train --train_dir truncated --test_dir images/test {VIT}",
        f"mm-hf train --train_dir bomb --test_dir images/test {VIT}",
        f"mm-hf train --train_dir text_as_image --test_dir images/test {VIT}",
        f"mm-hf train --train_dir one_class --test_dir one_class {VIT}",
        f"mm-hf train --dataset_name digts {VIT}",
        f"mm-hf train --dataset_name digits --test_split dev {VIT}",
        f"mm-hf train --dataset_name digits --image_column_name picture {VIT}",
        f"mm-hf train --dataset_name digits --label_column_name class {VIT}",
        f"mm-hf train --dataset_name empty_label {VIT}",
        f"mm-hf train --dataset_name unreadable {VIT}",
        f"mm-hf train --dataset_name latin_1 {VIT}",
        f"mm-hf train --dataset_name utf_16 {VIT}",
        f"mm-hf train --dataset_name unquoted {VIT}",
        f"mm-hf train --dataset_name ragged {VIT}",
        f"mm-hf train --dataset_name semicolons {VIT}",
        f"mm-hf train --dataset_name double_names {VIT}",
        f"mm-hf train --dataset_name unclosed_quote {VIT}",
        f"mm-hf train --dataset_name text_after_quote {VIT}",
        f"mm-hf train --dataset_name lone_quotes {VIT}",
        f"mm-hf train --dataset_name nul_byte {VIT}",
        f"mm-hf train --dataset_name empty_file {VIT}",
        f"mm-hf train --dataset_name no_rows {VIT}",
        f"mm-hf train --dataset_name several_formats {VIT}",
        f"mm-hf train --dataset_name other_columns {VIT}",
        f"mm-hf train --dataset_name other_classes {VIT}",
        f"mm-hf train --dataset_name fractions {VIT}",
        f"mm-hf train --dataset_name broken_line {VIT}",
        f"mm-hf train --dataset_name no_objects {VIT}",
        f"mm-hf train --dataset_name several_types {VIT}",
        f"mm-hf train --dataset_name large_integers {VIT}",
        f"mm-hf train --dataset_name addresses {VIT}",
        f"mm-hf train --dataset_name cut_parquet {VIT}",
        f"mm-hf train --dataset_name cut_stream {VIT}",
        f"mm-hf train --dataset_name two_streams {VIT}",
        f"mm-hf train --dataset_name numbers {VIT}",
        f"mm-hf train --train_dir two_tables --test_dir images/test {VIT}",
        f"mm-hf train --train_dir no_file_name --test_dir no_file_name {VIT}",
        f"mm-hf train --train_dir lost_image --test_dir lost_image {VIT}",
        f"mm-hf compare --dataset_name digits --ood_classes 11 {VIT}",
        f"mm-hf compare --dataset_name digits --ood_classes 0 1 2 3 4 5 6 7 8 {VIT}",
    ],
    "Models": [
        "mm-hf train --train_dir images/train --test_dir images/test --model_name_or_path vit_of_three_classes",
        "mm-hf check remote_code",
        "mm-hf train --train_dir images/train --test_dir images/test --model_name_or_path remote_code",
        "mm-hf check damaged_config",
        "mm-hf check damaged_weights",
        "mm-hf check empty",
        "mm-hf analyze vit --dataset_name digits",
        "train('./missing', DenseMultiMix())",
        "train('remote_code', DenseMultiMix())",
    ],
    "Training": [
        "train(vit, DenseMultiMix(), labels=[0, 1, 7, 0])",
        "train(vit, DenseMultiMix(), labels=[0, 1, -1, 0])",
        "train(vit, DenseMultiMix(), labels=['cat', 'dog', 'cat', 'dog'])",
        "train(vit, DenseMultiMix(), labels=[0, 1, None, 0])",
        "train(vit, DenseMultiMix(), batch_size=1)",
        "train(vit, 3)",
        "wrap_model(vit, 'mixup')",
        "train(vit, DenseMultiMix(), pixels=float('nan'))",
        "train(vit, Mixup(), pixels=float('nan'))",
        "wrap_model(torch.compile(vit), DenseMultiMix())",
        "wrap_model(torch.nn.DataParallel(vit), DenseMultiMix())",
        "train(gpt2, DenseMultiMix())",
        "train(vit, DenseMultiMix()) or train(vit, DenseMultiMix(), batch_size=2, resume_from_checkpoint=True)",
        "train(vit, DenseMultiMix()) or train(vit, Mixup(), resume_from_checkpoint=True)",
        "wrap_model(vit, MultiMix()) and wrap_model(vit, Mixup())",
        "train(regression, DenseMultiMix(attention='cam'), labels=[0.5, 1.5, 2.5, 3.5])",
    ],
}


def make_workspace(root: Path) -> None:
    """Create the files that the cases name."""
    root.mkdir(exist_ok=True)
    from mm_hf.data.models import configuration, image_processor

    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(8):
                _save(root / "images" / split / name / f"{i}.png", random)
    for i in range(3):
        _save(root / "flat" / f"{i}.png", random)
        _save(root / "one_class" / "cat" / f"{i}.png", random)
    for folder in ("truncated", "bomb", "text_as_image"):
        for name in ("cat", "dog"):
            for i in range(4):
                _save(root / folder / name / f"{i}.png", random)
    path = root / "truncated" / "cat" / "2.png"
    path.write_bytes(path.read_bytes()[:-30])
    (root / "text_as_image" / "cat" / "2.png").write_text("not an image")
    Image.new("1", (20000, 20000)).save(root / "bomb" / "cat" / "2.png")
    (root / "empty").mkdir()
    (root / "list.yaml").write_text("- 1\n")
    (root / "broken.yaml").write_text("alpha: [0.5, 2\n")
    tables = {
        "empty_label": "text,label\ngood,up\nbad,down\nfine,\npoor,down\n",
        "numbers": "length,label\n1.5,up\n2.5,down\n3.5,up\n",
    }
    for name, text in tables.items():
        (root / name).mkdir()
        for split in ("train", "test"):
            (root / name / f"{split}.csv").write_text(text)
    text = "text,label\n" + "".join(f"caf\u00e9 {i},{('up', 'down')[i % 2]}\n" for i in range(8))
    stream = _stream(text)
    files = {
        "unreadable/{}.csv": b"text,label\n\xff\xfe\x00,\x81\n",
        "latin_1/{}.csv": text.encode("latin-1"),
        "utf_16/{}.csv": text.encode("utf-16"),
        "unquoted/{}.csv": text.replace(",up", ", fine,up"),
        "ragged/{}.csv": text.replace(" 6,", ", fine,"),
        "semicolons/{}.csv": text.replace(",", ";"),
        "double_names/{}.csv": text.replace("text,label", "label,label"),
        "unclosed_quote/{}.csv": text.replace("caf\u00e9 6", '"caf\u00e9 6'),
        "text_after_quote/{}.csv": text.replace("caf\u00e9 6", '"caf\u00e9" 6'),
        "lone_quotes/{}.csv": text.replace("caf\u00e9 2", '"').replace("caf\u00e9 6", '"'),
        "nul_byte/{}.csv": text.replace(" 6", "\0"),
        "empty_file/{}.csv": "",
        "no_rows/{}.csv": "text,label\n",
        "several_formats/train.csv": text,
        "several_formats/test.tsv": text.replace(",", "\t"),
        "other_columns/train.csv": text,
        "other_columns/test.csv": text.replace("label", "class"),
        "other_classes/train.csv": text,
        "other_classes/test.csv": text.replace("up", "left"),
        "fractions/{}.csv": "text,label\ngood,0.5\nbad,1.0\n",
        "broken_line/{}.jsonl": '{"text": "good", "label": "up"}\n{"text": "bad", "label": \n',
        "no_objects/{}.jsonl": '{"text": "good", "label": "up"}\n["bad", "down"]\n',
        "several_types/{}.jsonl": '{"text": "good", "label": "up"}\n{"text": "bad", "label": 0}\n',
        "large_integers/{}.jsonl": '{"text": "good", "label": 1}\n{"text": "bad", "label": 9223372036854775808}\n',
        "addresses/{}.csv": "image,label\nhttps://example.com/1.png,up\nhttps://example.com/2.png,down\n",
        "cut_parquet/{}.parquet": b"PAR1" + bytes(60),
        "cut_stream/{}.arrow": stream[:-8],
        "two_streams/{}.arrow": 2 * stream,
        "two_tables/metadata.csv": "file_name,label\n0.png,up\n",
        "two_tables/metadata.jsonl": '{"file_name": "0.png", "label": "up"}\n',
        "no_file_name/metadata.csv": "file_name,label\n,up\n",
        "lost_image/metadata.csv": "file_name,label\n0.png,up\n",
    }
    for name, content in files.items():
        for split in ("train", "test"):
            path = root / name.format(split)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    from transformers import AutoModelForImageClassification

    for name, classes in (("vit", 2), ("vit_of_three_classes", 3), ("regression", 1)):
        names = [f"class {i}" for i in range(classes)]
        config = configuration("vit", f"{SMALL},intermediate_size=16", id2label=dict(enumerate(names)))
        AutoModelForImageClassification.from_config(config).save_pretrained(root / name)
        image_processor(config, None).save_pretrained(root / name)
    for name, file in (("damaged_config", "config.json"), ("damaged_weights", "model.safetensors")):
        (root / name).mkdir()
        for other in (root / "vit").iterdir():
            (root / name / other.name).write_bytes(other.read_bytes())
        (root / name / file).write_bytes((root / "vit" / file).read_bytes()[:100])
    plant_code(root / "remote_code")


def _stream(text: str) -> bytes:
    """Return the table of a CSV text as a stream of Arrow."""
    from pyarrow import BufferOutputStream, BufferReader, csv, ipc

    table, output = csv.read_csv(BufferReader(text.encode())), BufferOutputStream()
    with ipc.new_stream(output, table.schema) as writer:
        writer.write_table(table)
    return bytes(output.getvalue())


def plant_code(folder: Path) -> None:
    """Write a model whose configuration names code in its directory, which creates the file `ran` if it runs."""
    folder.mkdir()
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model", "AutoTokenizer": "code.T"}
    config = {"model_type": "planted", "auto_map": auto_map, "architectures": ["Model"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.T", None]}}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoImageProcessor": "code.P"}}))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Config: pass\n")


def _save(path: Path, random: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)


def namespace() -> dict[str, Any]:
    """Return the names that the Python cases use."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageClassification, GPT2Config, GPT2LMHeadModel, TrainingArguments

    import mm_hf
    from mm_hf import functional

    torch.manual_seed(0)
    vit, regression = map(AutoModelForImageClassification.from_pretrained, ("vit", "regression"))

    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)

    def train(
        model: Any,
        mixing: Any,
        labels: Any = (0, 1, 1, 0),
        batch_size: int = 4,
        pixels: float = 0.0,
        resume_from_checkpoint: bool = False,
    ) -> None:
        rows = {"pixel_values": torch.full((4, 1, 8, 8), pixels).tolist(), "labels": list(labels)}
        args = TrainingArguments(
            "out", per_device_train_batch_size=batch_size, max_steps=1, use_cpu=True, disable_tqdm=True
        )
        mm_hf.MultiMixTrainer(model, args, mixing=mixing, train_dataset=Dataset.from_dict(rows)).train(
            resume_from_checkpoint
        )

    return {
        **{name: getattr(mm_hf, name) for name in mm_hf.__all__}, **vars(functional), "torch": torch, "vit": vit,
        "logits": torch.randn(4, 3), "token_logits": torch.randn(4, 5, 3), "labels": torch.tensor([0, 1, 2, 0]),
        "soft_labels": torch.full((4, 3), 1 / 3), "attention": torch.rand(4, 5),
        "factors": mm_hf.sample_factors(4, 8, 1.0), "train": train, "regression": regression,
        "gpt2": GPT2LMHeadModel(config),
    }  # fmt: skip


def message_of(case: str, names: dict[str, Any]) -> str:
    """Run a case and return its message. Errors that are not user errors are raised."""
    from mm_hf import LocationError
    from mm_hf.cli import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        if case.startswith("mm-hf "):
            code = main(shlex.split(case)[1:])
            assert code == 2, f"{case}: exit code {code}"
            lines = [line for line in errors.getvalue().splitlines() if line.startswith("mm-hf")]
            return "\n".join(lines)
        try:
            eval(case, names)
        except (ValueError, TypeError, OSError, LocationError) as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{case} raises no error")


@contextlib.contextmanager
def workspace(root: Path) -> Iterator[dict[str, Any]]:
    """Create the files in an empty directory, work there, and yield the names for the cases."""
    before = Path.cwd()
    make_workspace(root)
    os.chdir(root)
    try:
        yield namespace()
    finally:
        os.chdir(before)
