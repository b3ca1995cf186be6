"""What is told about the mixing beside a saved model: settings as JSON, and a section of the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .locations import Plan
from .methods import Mixing, MultiMix

MIXING_FILE = "mixing.json"
CITATION = """@inproceedings{venkataramanan2023embedding,
  title     = {Embedding Space Interpolation Beyond Mini-Batch, Beyond Pairs and Beyond Examples},
  author    = {Venkataramanan, Shashanka and Kijak, Ewa and Amsaleg, Laurent and Avrithis, Yannis},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""


def save_mixing(directory: str | Path, mixing: Mixing, plan: Plan | None = None, num_mixed: int | None = None) -> Path:
    """Write the settings that a model was trained with, and how its locations were found, to `mixing.json`.

    `num_mixed` is what `num_mixed="auto"` has come to, with which a resumed training goes on.
    """
    from . import __version__

    path = Path(directory) / MIXING_FILE
    values = {
        "mixing": mixing.to_dict(),
        "locations": None if plan is None else plan.to_dict(),
        **({} if num_mixed is None else {"num_mixed": num_mixed}),
        "mm_hf_version": __version__,
    }
    path.write_text(json.dumps(values, indent=2) + "\n")
    return path


def load_mixing(directory: str | Path) -> Mixing:
    """The method that a model was trained with, from the `mixing.json` of its directory.

    Raises:
        FileNotFoundError: The directory has no `mixing.json`: it was not written by `MultiMixTrainer`.
    """
    path = Path(directory) / MIXING_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {MIXING_FILE} in {directory}: the model was not saved by MultiMixTrainer."
        )
    return Mixing.from_dict(json.loads(path.read_text())["mixing"])


def load_plan(directory: str | Path) -> Plan | None:
    """How the locations of the model in a directory were found, from its `mixing.json`; None if they were not needed."""
    values = json.loads((Path(directory) / MIXING_FILE).read_text())["locations"]
    return None if values is None else Plan.from_dict(values)


def load_num_mixed(directory: str | Path) -> int | None:
    """What `num_mixed="auto"` had come to when the checkpoint in a directory was written; None if it had not yet."""
    path = Path(directory) / MIXING_FILE
    return json.loads(path.read_text()).get("num_mixed") if path.exists() else None


def card_tags(mixing: Mixing) -> list[str]:
    """Tags of the model card's metadata."""
    return [mixing.name.replace("_", "-"), *(["multimix"] if "multimix" in mixing.name else [])]


def card_section(mixing: Mixing) -> str:
    """The section of a model card that says how the model was trained, in Markdown."""
    settings: Mapping[str, Any] = mixing.to_dict()
    rows = "\n".join(f"| `{name}` | {value} |" for name, value in settings.items())
    if isinstance(mixing, MultiMix):
        what = (
            ": mixed examples are interpolated from the\nwhole mini-batch in embedding space, and enter the loss beside or in "
            "place of the clean ones"
        )
        citation = f"\n```bibtex\n{CITATION}\n```\n"
    else:
        what, citation = "", ""
    return f"""## Mixing

Trained with mm_hf, method `{mixing.name}`{what}. The model itself is a plain
Transformers model: nothing but Transformers is needed to use it.

| setting | value |
|---|---|
{rows}
{citation}"""
