"""Command lines of `mm-hf` on scikit-learn's digits, and readers of what the commands write."""

import csv
from pathlib import Path

from mm_hf.cli import main

TINY = (
    "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,image_size=8,patch_size=4,"
    "num_channels=1"
)
OPTIONS = (
    f"--dataset_name digits --model_type vit --config_overrides {TINY} --max_train_samples 96 "
    "--max_validation_samples 40 --max_test_samples 80 --augmentation crop --num_train_epochs 2 "
    "--per_device_train_batch_size 32 --learning_rate 3e-3 --per_device_eval_batch_size 40 --use_cpu "
    "--robustness_samples 20"
).split()
SCREEN, COLUMNS = 40, 100  # lines and columns of a terminal
# Metrics that differ between two runs with the same seed.
COSTS = ("train_seconds", "peak_memory_mib")


def read_results(path):
    """Read the rows of results.csv except those of `COSTS`."""
    with Path(path).open() as file:
        return [row for row in csv.DictReader(file) if row["metric"] not in COSTS]


def screen_lines(text):
    """Return the number of lines that a text takes on a screen, whose width wraps long lines."""
    return sum(max(1, -(-len(line) // COLUMNS)) for line in text.rstrip("\n").split("\n"))


def command_error(capsys, *arguments):
    """Run an invalid command line and return its error message: one line, with exit code 2 and without a traceback."""
    assert main([str(x) for x in arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1
    return captured.err
