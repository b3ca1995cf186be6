"""Recordings that need no download: telephone prompts in five languages from Debian packages."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value

SOUNDS = Path(os.environ.get("ASTERISK_SOUNDS_DIR", "/usr/share/asterisk/sounds"))
# One voice per language. The English and Spanish voices are of the same speaker.
VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
OTHER_VOICE = ("it", "it_IT_f_Menardi")
MIN_SECONDS, MAX_SECONDS = 0.3, 10.0


def load_spoken_prompts() -> DatasetDict:
    """Load recordings (8 kHz, up to 10 s) whose label is their language.

    The columns are `audio` (not decoded), `label` and `prompt`. One fifth of the prompts is the split `validation`, in
    all languages. The split `other_voice` has these prompts in Italian by a speaker who does not occur in training, if
    the package with that voice is installed.

    Raises:
        FileNotFoundError: A package is not installed.
    """
    missing = [language for language, voice in VOICES.items() if not (SOUNDS / voice).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{SOUNDS} does not contain the prompts in {', '.join(missing)}: install the Debian packages "
            f"{' '.join(f'asterisk-core-sounds-{language}-wav' for language in missing)} (apt-get install), or set "
            "ASTERISK_SOUNDS_DIR to a directory with their files."
        )
    paths = {language: recordings(SOUNDS / voice) for language, voice in VOICES.items()}
    prompts = sorted({prompt for by_prompt in paths.values() for prompt in by_prompt})
    held_out = set(np.random.default_rng(0).permutation(prompts)[: len(prompts) // 5])
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for language, by_prompt in paths.items():
        for prompt, path in by_prompt.items():
            split = "validation" if prompt in held_out else "train"
            rows[split].append({"audio": path, "label": language, "prompt": prompt})
    language, voice = OTHER_VOICE
    if (SOUNDS / voice).is_dir():
        rows["other_voice"] = [
            {"audio": path, "label": language, "prompt": prompt}
            for prompt, path in recordings(SOUNDS / voice).items()
            if prompt in held_out
        ]
    features = Features(audio=Value("string"), label=ClassLabel(names=list(VOICES)), prompt=Value("string"))
    data = DatasetDict({split: Dataset.from_list(split_rows, features=features) for split, split_rows in rows.items()})
    return data.cast_column("audio", Audio(decode=False))  # decoding by datasets would require torchcodec


def recordings(directory: Path) -> dict[str, str]:
    """Return the files of a voice by prompt, such as "digits/7", without silence and too short or too long files."""
    found = {}
    for path in sorted(directory.rglob("*.wav")):
        prompt = str(path.relative_to(directory).with_suffix(""))
        if not prompt.startswith("silence/") and MIN_SECONDS <= _seconds(path) <= MAX_SECONDS:
            found[prompt] = str(path)
    return found


def _seconds(path: Path) -> float:
    with wave.open(str(path)) as file:
        return file.getnframes() / file.getframerate()


OFFLINE = {"spoken_prompts": load_spoken_prompts}
