"""Data on disk: directories of images and tables, as users have them."""

import io
import json

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from pyarrow import parquet

from mm_hf.data.options import DataOptions

TEXTS = [{"text": f"text {i}", "label": ("bad", "good")[i % 2]} for i in range(8)]


def image(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


def folders(root, names=("cat", "dog"), suffixes=(".png",), pattern="{split}/{name}/{i}{suffix}"):
    for split, count in (("train", 4), ("test", 2)):
        for name in names:
            for i in range(count):
                image(root / pattern.format(split=split, name=name, i=i, suffix=suffixes[i % len(suffixes)]))
    return DataOptions(train_dir=str(root / "train"), test_dir=str(root / "test"))


def by_name(options, root):
    return DataOptions(dataset_name=str(root))


def depths(root):
    folders(root)
    image(root / "train" / "cat" / "2020" / "may" / "deep.png")
    (root / "train" / "cat" / "0.png").unlink()
    return folders(root / ".", ("cat", "dog"))


def hidden(root):
    options = folders(root)
    image(root / "train" / ".cache" / "0.png")
    image(root / "train" / "cat" / "._0.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "cat/labels.csv"):
        (root / "train" / name).write_text("no image")
    return options


def linked(root):
    """Link a class elsewhere, and from there a directory above, which is not followed."""
    options = folders(root)
    (root / "train" / "dog").rename(root / "dogs")
    (root / "train" / "dog").symlink_to(root / "dogs", target_is_directory=True)
    (root / "dogs" / "back").symlink_to(root / "train", target_is_directory=True)
    return options


def linked_tables(root):
    tables(root / "elsewhere", write_csv)
    (root / "set").mkdir()
    (root / "set" / "data").symlink_to(root / "elsewhere", target_is_directory=True)
    return DataOptions(dataset_name=str(root / "set"))


def metadata(root, write=lambda rows, path: path.with_suffix(".csv").write_text(csv(rows)), label="label"):
    for split, count in (("train", 8), ("test", 4)):
        rows = [{"file_name": f"images/{i}.png", label: ("cat", "dog")[i % 2]} for i in range(count)]
        for row in rows:
            image(root / split / row["file_name"])
        write(rows, root / split / "metadata")
    return DataOptions(train_dir=str(root / "train"), test_dir=str(root / "test"))


def csv(rows, separator=","):
    lines = [separator.join(map(str, row.values())) for row in rows]
    return "\n".join([separator.join(rows[0]), *lines]) + "\n"


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def tables(root, write, rows=TEXTS, names=("train", "test")):
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        write(rows, root / name)
    return DataOptions(dataset_name=str(root))


def saved(root):
    rows = Dataset.from_list(TEXTS)
    DatasetDict(train=rows, test=rows).save_to_disk(root)
    return DataOptions(dataset_name=str(root))


def paths(root):
    rows = [{"photo": f"files/{i}.png", "label": ("cat", "dog")[i % 2]} for i in range(4)]
    for row in rows:
        image(root / row["photo"])
    return tables(root, write_csv, rows)


def contents(root, values=(b"", b""), column="image", **options):
    """Write Parquet files with the contents of image files, without metadata of `datasets`."""
    rows = {column: list(values) * 4, "label": ["cat", "dog"] * 4}
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        parquet.write_table(pa.table(rows), root / f"{split}.parquet")
    return DataOptions(dataset_name=str(root), train_val_split=0.25, **options)


def content(suffix="png"):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, suffix)
    return file.getvalue()


def write_jsonl(rows, path):
    path.with_suffix(".jsonl").write_text(lines(rows))


def write_json(rows, path):
    path.with_suffix(".json").write_text(json.dumps(rows))


def labels(values, write=write_jsonl):
    rows = [{"text": f"text {i}", "label": values[i % 2]} for i in range(8)]
    return lambda root: tables(root, write, rows)


def class_labels(root):
    rows = Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 0, 1]})
    rows = rows.cast_column("label", ClassLabel(names=["bad", "good"]))
    DatasetDict(train=rows, test=rows).save_to_disk(root)
    return DataOptions(dataset_name=str(root))


def write_csv(rows, path):
    path.with_suffix(".csv").write_text(csv(rows))


def write_tsv(rows, path):
    path.with_suffix(".tsv").write_text(csv(rows, "\t"))
