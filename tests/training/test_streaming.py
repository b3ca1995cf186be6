"""Training on streamed shards in the formats of large datasets."""

import io
import shutil
import tarfile

import numpy as np
import pytest
from datasets import IterableDataset, load_dataset
from transformers import ViTImageProcessorPil

from mm_hf import DenseMultiMix, MultiMixTrainer
from mm_hf.data.offline import load_digits
from tests.helpers import digits

PROCESSOR = ViTImageProcessorPil(
    size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False, do_resize=False
)


def write_tar(rows, file):
    with tarfile.open(file, "w") as tar:
        for i, row in enumerate(rows):
            image = io.BytesIO()
            row["image"].save(image, "png")
            for name, content in (("png", image.getvalue()), ("cls", str(row["label"]).encode())):
                entry = tarfile.TarInfo(f"{i:04d}.{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """240 digits in 4 shards of each format."""
    directory = tmp_path_factory.mktemp("shards")
    data = load_digits()["train"].select(range(240))
    data.save_to_disk(directory, num_shards=4)  # Arrow
    for i in range(4):
        part = data.shard(4, i)
        part.to_parquet(directory / f"{i}.parquet")
        write_tar(part, directory / f"{i}.tar")
    return directory


def prepare(rows):
    images = rows.get("image") or [image.convert("L") for image in rows["png"]]
    labels = rows.get("label") or rows["cls"]
    return {"pixel_values": PROCESSOR(images, return_tensors="np")["pixel_values"], "labels": labels}


def stream_of(shards, format):
    ending = {"webdataset": "tar"}.get(format, format)
    stream = load_dataset(format, data_files=str(shards / f"*.{ending}"), split="train", streaming=True)
    columns = list(next(iter(stream)))
    return stream.shuffle(seed=0, buffer_size=50).map(prepare, batched=True, batch_size=20, remove_columns=columns)


def trainer(stream, directory, **changes):
    args = {"max_steps": 4, "per_device_train_batch_size": 16, "save_strategy": "steps", "save_steps": 2, **changes}
    mixing = DenseMultiMix(num_mixed=20)
    return MultiMixTrainer(digits.vit(), digits.arguments(directory, **args), mixing=mixing, train_dataset=stream)


@pytest.mark.parametrize("format", ["parquet", "arrow", "webdataset"])
def test_streamed_shards_train_like_the_same_rows_in_memory(shards, tmp_path, format):
    stream = stream_of(shards, format)
    rows = list(stream)
    distinct = {(row["labels"], row["pixel_values"].tobytes()) for row in map(as_arrays, rows)}
    assert len(rows) == 240 and len(distinct) > 230 and len({row["labels"] for row in rows}) == 10
    streamed = trainer(stream, tmp_path, save_strategy="no")
    streamed.train()
    from_memory = trainer(IterableDataset.from_generator(lambda: iter(rows)), tmp_path, save_strategy="no")
    from_memory.train()
    digits.same_weights(digits.weights(streamed.model), digits.weights(from_memory.model))
    losses = [entry["loss_dense"] for entry in streamed.state.log_history if "loss_dense" in entry]
    assert len(losses) == 4 and losses == [e["loss_dense"] for e in from_memory.state.log_history if "loss_dense" in e]


def as_arrays(row):
    return {"labels": row["labels"], "pixel_values": np.asarray(row["pixel_values"], dtype=np.float32)}


def test_resuming_in_the_middle_of_a_stream_is_exact(shards, tmp_path):
    whole = trainer(stream_of(shards, "parquet"), tmp_path)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = trainer(stream_of(shards, "parquet"), tmp_path)
    resumed.train(resume_from_checkpoint=True)
    digits.same_weights(digits.weights(resumed.model), digits.weights(whole.model))
