"""The script for audio classification on synthetic tones, and its dataset of recordings if that is installed."""

import json

import numpy as np
import pytest
import run_audio_classification as audio
import soundfile
import yaml
from datasets import Audio, Dataset
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, DataCollatorWithPadding

from mm_hf import DenseMultiMix, extract, probe
from mm_hf.data import offline_voices
from mm_hf.training.hub import load_mixing, load_plan
from tests.helpers.scripts import RECIPES, run_script

needs_voices = pytest.mark.skipif(
    not (offline_voices.SOUNDS / "ru_RU_f_IvrvoiceRU").is_dir(),
    reason="needs the Debian packages asterisk-core-sounds-{en,es,fr,it,ru}-wav",
)
RATE = 8000
TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
SPECTROGRAM = f"{TINY},num_mel_bins=32,max_length=32,frequency_stride=16,time_stride=16,initializer_range=0.2"
WAVES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": [16, 16],
    "conv_kernel": [10, 8], "conv_stride": [10, 8], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "mask_time_prob": 0.0,
}  # fmt: skip
SHORT = [
    "--do_train",
    "--do_eval",
    "--logging_steps",
    "1",
    "--save_strategy",
    "no",
    "--report_to",
    "none",
    "--disable_tqdm",
    "1",
    "--use_cpu",
]


def tone(pitch, seconds, rate=RATE, seed=0):
    times = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(times))
    return 0.4 * np.sin(2 * np.pi * pitch * times) + 0.02 * noise


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the script with options and returns the results in `tmp_path/out`."""

    def start(*options):
        where = [] if str(options[0]).endswith(".yaml") else ["--output_dir", tmp_path / "out"]
        run_script("run_audio_classification", *options, *where)
        return json.loads((tmp_path / "out" / "all_results.json").read_text())

    return start


@pytest.fixture
def tones(tmp_path):
    """Write one directory of tones per pitch, in two formats and at two sampling rates; return the directory of all."""
    for name, pitch in {"low": 300, "middle": 900, "high": 2500}.items():
        for i in range(12):
            folder = tmp_path / "tones" / name / ("more" if i % 3 else "")
            folder.mkdir(parents=True, exist_ok=True)
            rate = (RATE, 2 * RATE)[i % 2]
            wave = tone(pitch * (1 + 0.01 * i), 0.4 + 0.1 * (i % 4), rate, seed=i)
            soundfile.write(folder / f"{i}.{('wav', 'flac')[i % 2]}", wave, rate)
    return tmp_path / "tones"


def test_spectrogram_transformer_learns_three_tones(run, tones, tmp_path):
    options = (
        f"--train_dir {tones} --config_overrides {SPECTROGRAM} --max_length_seconds 0.5 --train_val_split 0.25".split()
    )
    options += ["--feature_extractor_overrides", json.dumps({"sampling_rate": RATE})]
    options += ["--mixing", "dense_multimix", "--num_mixed", "50", "--learning_rate", "1e-2", "--max_steps", "40"]
    results = run(*options, "--per_device_train_batch_size", 9, *SHORT)
    assert results["eval_accuracy"] > 0.8
    out = tmp_path / "out"
    assert load_mixing(out) == DenseMultiMix(num_mixed=50)
    card = (out / "README.md").read_text()
    assert "dense-multimix" in card and "audio-classification" in card
    model, extractor = AutoModelForAudioClassification.from_pretrained(out), AutoFeatureExtractor.from_pretrained(out)
    assert list(model.config.id2label.values()) == ["high", "low", "middle"] and extractor.sampling_rate == RATE
    inputs = extractor(tone(2600, 0.5).astype(np.float32), sampling_rate=RATE, return_tensors="pt")
    assert model.config.id2label[int(model(**inputs).logits.argmax())] == "high"


def test_waveforms_of_different_lengths_train_from_a_data_set_directory(run, tmp_path):
    """Train wav2vec 2.0 with padding on a directory as on the Hub: encoded recordings in Parquet."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(16):
        soundfile.write(tmp_path / "one.wav", tone(400 * (1 + i % 2), 0.1 + 0.02 * (i % 3)), RATE)
        rows.append({"sound": {"bytes": (tmp_path / "one.wav").read_bytes(), "path": None}, "kind": i % 2})
    data = Dataset.from_list(rows).cast_column("sound", Audio(decode=False))
    for split in ("train", "validation"):
        data.to_parquet(folder / f"{split}.parquet")
    options = (
        f"--dataset_name {folder} --audio_column_name sound --label_column_name kind --model_type wav2vec2".split()
    )
    options += ["--config_overrides", json.dumps(WAVES), "--attention_mask", "true", "--max_steps", 3]
    results = run(*options, "--mixing", "dense_multimix", "--num_mixed", 20, "--per_device_train_batch_size", 8, *SHORT)
    assert 0 <= results["eval_accuracy"] <= 1
    assert load_plan(tmp_path / "out").pool == "mean[nonzero]"
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert extractor.return_attention_mask and extractor.sampling_rate == 16000


def test_padding_is_not_a_location():
    model_args = audio.ModelArguments(model_type="wav2vec2", config_overrides=json.dumps(WAVES), attention_mask=True)
    model, extractor = audio.load_model(model_args, ["a", "b"])
    waves = [tone(500, seconds, 16000).astype(np.float32) for seconds in (0.1, 0.2, 0.15)]
    found = extractor(waves, sampling_rate=16000)
    batch = DataCollatorWithPadding(extractor)([{k: v[i] for k, v in found.items()} for i in range(3)])
    seen = extract(model.eval(), **batch)
    frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(1))
    assert seen.mask.sum(1).tolist() == frames.tolist() and probe(model, batch).pool == "mean[nonzero]"


def test_recordings_are_read_as_mono_at_the_given_rate(tmp_path):
    wave = np.stack([tone(500, 0.5, 44100), np.zeros(22050)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", wave, 44100)
    found = audio.read({"path": str(tmp_path / "stereo.wav"), "bytes": None}, 16000)
    assert found.shape == (8000,) and found.dtype == np.float32
    assert np.abs(np.fft.rfft(found)).argmax() / 0.5 == pytest.approx(500, abs=2)  # Hz
    assert np.abs(found).max() == pytest.approx(0.2, abs=0.05)
    same = audio.read({"path": None, "bytes": (tmp_path / "stereo.wav").read_bytes()}, 16000)
    assert np.array_equal(found, same)


def test_segments_are_random_only_in_training():
    wave = np.arange(1000)
    starts = {int(audio.random_crop(wave, 990)[0]) for _ in range(200)}
    assert starts == set(range(11)) and len(audio.random_crop(wave, 990)) == 990
    assert audio.random_crop(wave, 1000) is not wave and np.array_equal(audio.random_crop(wave, 2000), wave)


def test_invalid_options_raise_a_value_error(tones):
    with pytest.raises(ValueError, match="Give --dataset_name .*spoken_prompts.* or --train_dir"):
        audio.DataTrainingArguments()
    with pytest.raises(ValueError, match="--max_length_seconds must be positive, but is 0"):
        audio.DataTrainingArguments(train_dir="x", max_length_seconds=0)
    with pytest.raises(ValueError, match="--train_dir .*/more' has no subdirectory with recordings .*\\.wav"):
        audio.read_folders(audio.DataTrainingArguments(train_dir=str(tones / "low" / "more")))
    data_args = audio.DataTrainingArguments(train_dir=str(tones), eval_split_name="other")
    with pytest.raises(ValueError, match="--eval_split_name is 'other', but the splits are train"):
        audio.load_data(data_args, audio.ModelArguments(), seed=0)


def test_missing_recordings_name_their_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(offline_voices, "SOUNDS", tmp_path)
    with pytest.raises(FileNotFoundError, match="asterisk-core-sounds-en-wav .* asterisk-core-sounds-ru-wav"):
        offline_voices.load_spoken_prompts()


def test_training_and_validation_have_different_prompts(monkeypatch, tmp_path):
    monkeypatch.setattr(offline_voices, "SOUNDS", tmp_path)
    for voice in (*offline_voices.VOICES.values(), offline_voices.OTHER_VOICE[1]):
        for i, seconds in enumerate([0.5] * 10 + [0.1, 11]):
            (tmp_path / voice / "digits").mkdir(parents=True, exist_ok=True)
            (tmp_path / voice / "silence").mkdir(exist_ok=True)
            soundfile.write(tmp_path / voice / "digits" / f"{i}.wav", tone(500, seconds), RATE)
        soundfile.write(tmp_path / voice / "silence" / "1.wav", np.zeros(RATE), RATE)
    data = offline_voices.load_spoken_prompts()
    assert {split: len(rows) for split, rows in data.items()} == {"train": 40, "validation": 10, "other_voice": 2}
    said = {split: set(rows["prompt"]) for split, rows in data.items()}
    assert not said["train"] & said["validation"] and said["other_voice"] == said["validation"]
    assert {path.split("/")[-2] for path in (row["path"] for row in data["train"]["audio"])} == {"digits"}
    assert set(data["other_voice"]["label"]) == {3}


@needs_voices
def test_recipe_for_spoken_prompts(run, tmp_path):
    options = yaml.safe_load((RECIPES / "spoken_prompts.yaml").read_text())
    options |= {"max_train_samples": 64, "max_eval_samples": 40, "max_steps": 3, "save_strategy": "no", "use_cpu": True}
    options |= {"output_dir": str(tmp_path / "out"), "disable_tqdm": True}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    run(tmp_path / "options.yaml")
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "out").config.id2label[4] == "ru"


def test_parser_accepts_the_recipe():
    _, data_args, training_args, mixing = audio.parse_arguments([str(RECIPES / "spoken_prompts.yaml")])
    assert data_args.dataset_name in offline_voices.OFFLINE and training_args.do_train and mixing == DenseMultiMix()
