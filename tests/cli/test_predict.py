"""`mm-hf predict`: the probabilities of `pipeline`, for images, texts and recordings, and errors that name the file."""

import csv
import wave

import numpy as np
import pytest
from PIL import Image
from scipy.signal import resample_poly
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    pipeline,
)

from mm_hf.cli import main
from tests.helpers.commands import command_error


@pytest.fixture
def vit(tmp_path):
    names = {0: "cat", 1: "=dog"}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        id2label=names, label2id={name: i for i, name in names.items()}, initializer_range=1.0,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    random = np.random.default_rng(0)
    for i in range(5):
        path = tmp_path / "photos" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
    return tmp_path


def test_predictions_equal_those_of_a_pipeline(vit):
    out = vit / "out.csv"
    assert main(["predict", f"{vit}/vit", f"{vit}/photos", "--output_file", str(out), "--batch_size", "2"]) == 0
    rows = list(csv.DictReader(out.open()))
    files = sorted((vit / "photos").rglob("*.png"))
    assert [row["file"] for row in rows] == [str(path) for path in files]
    classify = pipeline("image-classification", f"{vit}/vit")
    for row, path in zip(rows, files, strict=True):
        best = classify(str(path))[0]
        assert row["label"].removeprefix("'") == best["label"] and not row["label"].startswith("=")
        assert float(row["probability"]) == pytest.approx(best["score"], abs=1e-4)


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.jsonl", "rows.parquet"])
def test_a_table_is_not_predicted_as_one_text(name, reviews, tmp_path, capsys):
    (tmp_path / name).write_text("text\nvery good film\n")
    message = command_error(capsys, "predict", reviews[1], tmp_path / name)
    assert f"{name} is a table, and each file is one text: write each text to a .txt file" in message


def test_predictions_of_texts_are_printed(reviews, tmp_path, capsys):
    _, model = reviews
    (tmp_path / "one.txt").write_text("very good film")
    assert main(["predict", str(model), str(tmp_path / "one.txt")]) == 0
    header, line = capsys.readouterr().out.splitlines()[-2:]
    best = pipeline("text-classification", str(model))("very good film")[0]
    assert header == "file,label,probability" and line.endswith(f"one.txt,{best['label']},{best['score']:.4f}")


@pytest.mark.parametrize("masked", [True, False], ids=["attention mask", "no attention mask"])
def test_predictions_of_recordings_do_not_depend_on_the_other_files(masked, tmp_path):
    """Recordings of other lengths, sampling rates and numbers of channels, written by the standard library."""
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[16, 16],
        conv_kernel=[10, 8], conv_stride=[10, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_labels=3,
        num_conv_pos_embedding_groups=2, classifier_proj_size=16, initializer_range=1.0,
        feat_extract_norm="layer" if masked else "group",
    )  # fmt: skip
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=masked)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    extractor.save_pretrained(tmp_path / "model")
    (tmp_path / "sounds").mkdir()
    random, waves = np.random.default_rng(0), []
    for i, (seconds, rate, channels) in enumerate([(0.2, 8000, 1), (0.5, 8000, 2), (0.3, 16000, 1), (0.2, 8000, 1)]):
        samples = random.normal(scale=3000, size=(int(seconds * rate), channels)).astype("<i2")
        with wave.open(str(tmp_path / "sounds" / f"{i}.wav"), "wb") as file:
            file.setnchannels(channels), file.setsampwidth(2), file.setframerate(rate)
            file.writeframes(samples.tobytes())
        mono = (samples / 2**15).mean(axis=1)
        waves.append(mono if rate == 8000 else resample_poly(mono, 1, 2))
    out = tmp_path / "out.csv"
    assert main(["predict", f"{tmp_path}/model", f"{tmp_path}/sounds", "--output_file", str(out)]) == 0
    classify = pipeline("audio-classification", f"{tmp_path}/model")
    for row, values in zip(csv.DictReader(out.open()), waves, strict=True):
        best = classify(values.astype(np.float32))[0]
        assert row["label"] == best["label"] and float(row["probability"]) == pytest.approx(best["score"], abs=2e-4)


def test_a_damaged_recording_is_named(tmp_path, capsys):
    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "model")
    (tmp_path / "bad.wav").write_bytes(b"RIFF no recording")
    assert "bad.wav cannot be read" in command_error(capsys, "predict", tmp_path / "model", tmp_path / "bad.wav")


def test_unreadable_and_missing_files_are_named(vit, capsys):
    (vit / "photos" / "0" / "0.png").write_text("no image")
    assert "photos/0/0.png cannot be read" in command_error(capsys, "predict", vit / "vit", vit / "photos")
    assert "nowhere does not exist" in command_error(capsys, "predict", vit / "vit", vit / "nowhere")
    assert "MODEL or FILES are missing" in command_error(capsys, "predict", vit / "vit")
    (vit / "empty").mkdir()
    assert "has no image files" in command_error(capsys, "predict", vit / "vit", vit / "empty")
