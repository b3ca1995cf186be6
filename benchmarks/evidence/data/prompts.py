"""Spoken prompts of a telephone exchange in five languages, from Debian packages."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from transformers import ASTFeatureExtractor

from benchmarks.evidence.data.examples import Examples, require_debian_package, require_package
from mm_hf.data.offline_voices import OTHER_VOICE, SOUNDS, VOICES, load_spoken_prompts

LANGUAGES = tuple(VOICES)
SAMPLING_RATE, SECONDS = 8000, 2.56
FRAMES, MEL_BINS = 128, 64


@cache
def prompts() -> dict[str, Examples]:
    """Return spectrograms (128, 64) of the recordings by split: training, search, validation, test, other_voice.

    No prompt is in two splits of `training`, `search`, `validation` and `test`. The split `other_voice` has the test
    prompts in Italian, by a voice that is in no other split.

    Raises:
        FileNotFoundError: A Debian package with recordings is not installed.
        ModuleNotFoundError: soundfile is not installed.
    """
    require_package("soundfile", "soundfile")
    require_debian_package("asterisk-prompt-it-menardi-wav", SOUNDS / OTHER_VOICE[1])
    data = load_spoken_prompts()
    rows = data["train"].to_list()
    names = sorted({row["prompt"] for row in rows})
    order = np.random.default_rng(0).permutation(names).tolist()
    parts = {"validation": set(order[: len(order) // 8]), "search": set(order[len(order) // 8 : len(order) // 3])}
    parts["training"] = set(names) - parts["validation"] - parts["search"]
    splits = {name: [row for row in rows if row["prompt"] in part] for name, part in parts.items()}
    splits |= {"test": data["validation"].to_list(), "other_voice": data["other_voice"].to_list()}
    return {name: _spectrograms(part) for name, part in splits.items()}


def _spectrograms(rows: list[dict]) -> Examples:
    import soundfile

    extractor = ASTFeatureExtractor(sampling_rate=SAMPLING_RATE, num_mel_bins=MEL_BINS, max_length=FRAMES)
    waves = [soundfile.read(row["audio"]["path"])[0][: round(SECONDS * SAMPLING_RATE)] for row in rows]
    values = extractor(waves, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_values"]
    return Examples(torch.tensor([row["label"] for row in rows]), input_values=values)
