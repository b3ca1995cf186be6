"""Names and sentences that were replaced by standard terms and plain English."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("mm_hf", "tests", "examples", "benchmarks", "docs", ".github", ".ci")
SUFFIXES = {".py", ".md", ".yml", ".yaml", ".toml", ".csv", ".jinja", ".txt", ""}
# Distinctive names only: words such as `restore` and `read` have other uses. Parts of longer names do not count.
NAMES = [
    "Everyone", "from_everyone", "refuse_join", "process_generator", "lay_out", "laid_out", "ungrid", "unmix",
    "Mixer.blocks", "sums_labels", "mixer_of", "_Walked", "_walk", "by_targets", "taking_part", "sample_orders",
    "Pacer", "pacing", "size_is_open", "traceless", "without_zero_weights", "Taps", "tapped", "listening",
    "AttentionTap", "BlockTaps", "find_flaw", "flaw_anywhere", "last_whole_checkpoint", "is_persons",
    "PushingTrainer", "FromVectors", "_misleading", "_Told", "_tell", "going_on", "begin_epoch", "ImageRows",
    "coverage.csv", "coverage.py", "RARE", "DECIDED", "Refusing", "parser_of", "kill.py", "num_vertices",
    "input_mixup", "input_mixup_after", "otherwise=", "Board", "_Block", "sources/examples.py", "make coverage",
]  # fmt: skip
SENTENCES = [
    "Imports go down this list only",
    "Who raises a bound raises the pin",
    "leaves the model less sure than it may be",
    "It and the weights are ours",
    "behind the best of each task beyond the interval on none",
    "wherever all that the logits depend on goes through one list of blocks",
    "There is no completion by the shell",
    "eight small tasks are no law",
    "zero if nobody takes part",
    "So few classes are mixed as numbers by a product",
    "the mixer's own affair",
    "Who says when inputs are mixed wants no more of it",
    "are attended to as far as the longer one goes",
    "it would be waited for for ever",
    "What is missing or cut off of what a resumed training reads",
    "By these a card is known that a program wrote",
    "Whether the model is as it was when it was looked at",
    "Numbers in place of weights that are all zero",
    "none may be read in secret",
    "the first run would else pay for what is set up but once",
]


@pytest.fixture(scope="module")
def texts():
    """Return the text of each file of the repository but this one, by path."""
    files = [path for place in PLACES for path in (ROOT / place).rglob("*")] + list(ROOT.glob("*"))
    wanted = {path for path in files if path.is_file() and path.suffix in SUFFIXES} - {Path(__file__)}
    return {str(path.relative_to(ROOT)): path.read_text("utf-8", errors="ignore") for path in wanted}


def test_replaced_name_does_not_come_back(texts):
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}(?!\w)" for name in NAMES))
    found = {path: sorted(set(pattern.findall(text))) for path, text in texts.items() if pattern.search(text)}
    assert not found


def test_replaced_sentence_does_not_come_back(texts):
    plain = {path: re.sub(r"[\s#>*]+", " ", text) for path, text in texts.items()}
    assert not [(path, sentence) for path, text in plain.items() for sentence in SENTENCES if sentence in text]
