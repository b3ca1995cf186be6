"""Tests of the data of the evidence study: splits, augmentation, and errors that name missing packages."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evidence import runs
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.data import examples, glyphs, packages, prompts, stamps
from benchmarks.evidence.data.examples import AugmentedExamples, Examples
from benchmarks.evidence.runs import PooledRun
from benchmarks.evidence.tasks import TASKS
from mm_hf.comparison import Run

INDEX = """Package: python3-frobnicate
Source: frobnicate (1.2)
Section: python
Description: Frobnicate in pure Python, python3-frobnicate for short

Package: libfrob1
Source: frobnicate
Section: contrib/libs
Description-en: shared library

Package: frob-dbg
Section: debug
Description: debug symbols

Package: tetris
Section: games
Description: falling blocks
"""


def test_index_is_parsed_into_source_section_and_description():
    assert list(packages.parse_index(INDEX)) == [
        ("frobnicate", "python", "Frobnicate in pure Python, for short"),
        ("frobnicate", "libs", "shared library"),
        ("tetris", "games", "falling blocks"),
    ]


def test_packages_of_a_source_are_in_one_subset():
    sources = np.random.default_rng(0).permutation(np.repeat(np.arange(60), np.arange(60) % 4 + 1).astype(str))
    first, second, third = packages.split_by_source(sources, [30, 40, 20])
    assert [len(part) for part in (first, second, third)] == [30, 40, 20]
    groups = [set(sources[part]) for part in (first, second, third)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert set(third) <= set(packages.split_by_source(sources, [30, 40, 35])[2])
    with pytest.raises(ValueError, match="the number of packages"):
        packages.split_by_source(sources, [200])


def test_fonts_are_in_one_subset_and_symbols_may_be_missing():
    fonts = torch.rand(20, len(glyphs.CHARACTERS + glyphs.SYMBOLS), 4, 4) + 0.1
    fonts[3, -1] = 0  # a symbol that the font lacks
    test, train = glyphs.split_fonts(fonts, 5, 10)
    pairs = (test[:, None] == train[None]).flatten(2).all(dim=-1)
    assert len(test) == 5 and len(train) == 10 and not pairs.any()
    assert torch.equal(glyphs.split_fonts(fonts, 5, 15)[1][:10], train)
    found = glyphs.to_examples(fonts, "Ab")
    assert found.labels.tolist() == [0, 1] * 20
    assert torch.equal(found.inputs["pixel_values"][1, 0], 2 * fonts[0, glyphs.CHARACTERS.index("b")] - 1)
    assert len(glyphs.to_examples(fonts, glyphs.SYMBOLS)) == 20 * len(glyphs.SYMBOLS) - 1
    with pytest.raises(ValueError, match="the number of fonts"):
        glyphs.split_fonts(fonts, 15, 10)


def test_characters_are_scaled_and_centered():
    files = list(Path("/usr/share/fonts").rglob("DejaVuSans.ttf"))
    if not files:
        pytest.skip("fonts-dejavu-core is not installed")
    font = glyphs.ImageFont.truetype(str(files[0]), glyphs.FONT_SIZE)
    rows, columns = (glyphs.render(font, "H") > 0.5).nonzero().T
    assert rows.min() == 4 and rows.max() == 23  # 20 of 28 pixels
    assert abs(columns.min() + columns.max() - 27) <= 1
    assert not glyphs.render(font, " ").any()


def test_folds_are_a_stratified_partition():
    labels = torch.arange(5).repeat_interleave(torch.tensor([7, 10, 20, 33, 41]))
    folds = [stamps.split_fold(labels, fold, 4) for fold in range(4)]
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(labels)))
    for train, test in folds:
        assert not set(train) & set(test) and len(train) + len(test) == len(labels)
        assert all(abs((labels[test] == k).sum() - (labels == k).sum() / 4) <= 1 for k in range(5))


def test_augmentation_depends_on_seed_epoch_and_index_only():
    pixels = torch.rand(3, 1, 8, 8)
    data = AugmentedExamples(
        Examples(torch.arange(3), pixel_values=pixels),
        lambda image, generator: examples.random_flip(examples.random_crop(image, generator, 2), generator),
    )
    data.seed_augmentation(1, 2)
    first = [data[i]["pixel_values"] for i in range(3)]
    torch.rand(5)  # global random numbers have no effect
    assert all(torch.equal(data[i]["pixel_values"], first[i]) for i in (2, 0, 1))
    for seed, epoch in ((1, 3), (2, 2)):
        data.seed_augmentation(seed, epoch)
        assert any(not torch.equal(data[i]["pixel_values"], first[i]) for i in range(3))
    assert data[1]["labels"] == 1 and data[1]["pixel_values"].shape == (1, 8, 8)


def test_random_crop_shifts_the_image():
    image = torch.arange(36.0).reshape(1, 6, 6)
    shifts = set()
    for seed in range(100):
        shifted = examples.random_crop(image, torch.Generator().manual_seed(seed), 1)
        shifts.add(int(shifted[0, 3, 3] - image[0, 3, 3]))
    assert shifts == {6 * y + x for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_metrics_of_folds_are_computed_on_all_test_examples(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "folded", dataclasses.replace(TASKS["digits_vit"], folds=2))
    for fold, (right, count) in enumerate([(3, 4), (2, 6)]):
        labels = np.zeros(count, dtype=int)
        logits = np.where(np.arange(count)[:, None] < right, [[2.0, 0.0]], [[0.0, 2.0]])
        directory = tmp_path / "folded" / f"fold-{fold}" / "runs" / "erm" / "seed-0"
        directory.mkdir(parents=True)
        metrics = {"accuracy": right / count, "train_seconds": 3.0 + fold, "fgsm_accuracy": 0.5 * fold}
        Run("erm", 0, metrics, {}, [], [], "", directory).write({"logits": logits, "labels": labels})
        pooled = runs.finished_runs(tmp_path / "folded")
        assert bool(pooled) == (fold == 1)  # a method counts when all folds are finished
    run = pooled["erm"][0]
    assert isinstance(run, PooledRun) and run.arrays["labels"].shape == (10,)
    assert run.metrics["accuracy"] == 0.5 and run.metrics["train_seconds"] == 7.0
    assert run.metrics["fgsm_accuracy"] == 0.25 and run.metrics["nll"] > 0


@pytest.mark.parametrize(
    ("task", "package"),
    [
        ("glyphs_vit", "fonts-lato"),
        ("stamps_dinov2", "tuxpaint-stamps-default"),
        ("packages_minilm", "apt-get update"),
        ("prompts_ast", "asterisk-prompt-it-menardi-wav"),
    ],
)
def test_error_names_the_missing_debian_package(monkeypatch, tmp_path, capsys, task, package):
    monkeypatch.setattr(glyphs, "FILE_LISTS", tmp_path)
    monkeypatch.setattr(stamps, "STAMPS", tmp_path / "nowhere")
    monkeypatch.setattr(prompts, "SOUNDS", tmp_path)
    monkeypatch.setattr(prompts, "require_package", lambda name, module: tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/usr/bin/apt-cache")
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"stdout": INDEX}))
    packages.descriptions.cache_clear()
    prompts.prompts.cache_clear()
    arguments = [
        "run",
        "--tasks",
        task,
        *(f"--{name}={tmp_path}" for name in ("output_dir", "results_dir", "docs_dir")),
    ]
    assert main(arguments) == 2
    assert package in capsys.readouterr().err
