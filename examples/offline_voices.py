"""Real recordings that need no download: what a telephone exchange says, in five languages, from Debian packages."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value

SOUNDS = Path(os.environ.get("ASTERISK_SOUNDS_DIR", "/usr/share/asterisk/sounds"))
OFFLINE = ("spoken_prompts",)
# One voice for each language; English and Spanish are the same person's.
VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
OTHER_VOICE = ("it", "it_IT_f_Menardi")
SHORTEST, LONGEST = 0.3, 10.0  # seconds


def load_offline(name: str) -> DatasetDict:
    """A data set of `OFFLINE` by name."""
    if name == "spoken_prompts":
        return load_spoken_prompts()
    raise ValueError(f"There is no offline data set {name!r}. There are {', '.join(OFFLINE)}.")


def load_spoken_prompts() -> DatasetDict:
    """Which language is it? Recordings of 8 kHz and up to 10 s: `audio` (not decoded), `label` and `prompt`.

    A fifth of the prompts is for validation: what one language says there, none says in training. The split `other_voice`
    has these prompts in Italian, by somebody who is not heard in training, if the package with that voice is there.
    """
    missing = [language for language, voice in VOICES.items() if not (SOUNDS / voice).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"The spoken prompts in {', '.join(missing)} are not in {SOUNDS}. Install the Debian packages "
            f"{' '.join(f'asterisk-core-sounds-{language}-wav' for language in missing)} (apt-get install), or set "
            "ASTERISK_SOUNDS_DIR to a directory with what is in them."
        )
    found = {language: recordings(SOUNDS / voice) for language, voice in VOICES.items()}
    prompts = sorted({prompt for of_voice in found.values() for prompt in of_voice})
    held_out = set(np.random.default_rng(0).permutation(prompts)[: len(prompts) // 5])
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for language, of_voice in found.items():
        for prompt, path in of_voice.items():
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
    data = DatasetDict({split: Dataset.from_list(of_split, features=features) for split, of_split in rows.items()})
    return data.cast_column("audio", Audio(decode=False))  # from paths: files themselves would need torchcodec


def recordings(directory: Path) -> dict[str, str]:
    """Files of a voice by what they say, such as "digits/7", without silence and what is too short or too long."""
    found = {}
    for path in sorted(directory.rglob("*.wav")):
        prompt = str(path.relative_to(directory).with_suffix(""))
        if not prompt.startswith("silence/") and SHORTEST <= _seconds(path) <= LONGEST:
            found[prompt] = str(path)
    return found


def _seconds(path: Path) -> float:
    with wave.open(str(path)) as file:
        return file.getnframes() / file.getframerate()
