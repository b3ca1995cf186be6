"""Tables of the classification classes of Transformers and of timm's models, and the methods that train them.

`make model-table` (benchmarks/supported_models.py and benchmarks/timm_models.py) writes them after training a small
random model of every class, and of every family of timm.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("supported_models.csv")
TIMM_TABLE = Path(__file__).with_name("timm_models.csv")


@dataclass(frozen=True)
class SupportedModel:
    """Results of one class of Transformers, or of one model of timm.

    Attributes:
        name: Name of the class; "timm/" and the name of the model for timm.
        task: "text", "image", "audio" or "video".
        architecture: Its `model_type`; the module and the family of timm, such as "vision_transformer/vit".
        multimix: True if MultiMix trains it.
        dense_multimix: True if Dense MultiMix trains it: per-location logits reproduce its logits.
        manifold_mixup: True if manifold mixup trains it: its blocks were found.
        attention: The kind that `attention="auto"` selects, "cls" or "gap"; "" without Dense MultiMix.
        attention_readable: True if the attention of its tokens can be read.
        pool: The tokens that its head reads (see `mm_hf.locations.pools`).
        head: The head's steps from one token to its logits.
        reason: The reason why a method does not train it, or "".
        transformers: The version of Transformers that was tested; "" for a class that was not tested.
    """

    name: str
    task: str
    architecture: str
    multimix: bool = False
    dense_multimix: bool = False
    manifold_mixup: bool = False
    attention: str = ""
    attention_readable: bool = False
    pool: str = ""
    head: str = ""
    reason: str = ""
    transformers: str = ""


@cache
def supported_models(table: Path = TABLE) -> tuple[SupportedModel, ...]:
    """Read a table, which has one row per class, or per family of timm (`TIMM_TABLE`).

    Example:
        >>> vit = next(row for row in supported_models() if row.name == "ViTForImageClassification")
        >>> vit.dense_multimix, vit.attention, vit.pool
        (True, 'cls', 'token[0]')
    """
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    flags = {f.name for f in fields(SupportedModel) if f.type == "bool"}
    values: list[dict[str, Any]] = [{k: v == "yes" if k in flags else v for k, v in row.items()} for row in rows]
    return tuple(SupportedModel(**row) for row in values)


def write_supported_models(rows: Iterable[SupportedModel], path: Path) -> None:
    """Write a table that [`supported_models`] can read."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(SupportedModel)])
        for row in rows:
            writer.writerow(
                [{True: "yes", False: "no"}.get(v, v) if isinstance(v, bool) else v for v in vars(row).values()]
            )


def installed() -> tuple[SupportedModel, ...]:
    """List the classification classes of the installed Transformers, and one model per family of timm.

    The row of an untested class is empty.

    Example:
        >>> all(row.task in ("text", "image", "audio", "video") for row in installed())
        True
    """
    from transformers.models.auto import modeling_auto as auto

    known = {row.name: row for row in supported_models()}
    mappings: dict[str, Any] = {
        "text": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio": auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "video": auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
    }
    found: dict[str, SupportedModel] = {}
    for task, mapping in mappings.items():
        for architecture, names in mapping.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, known.get(name) or SupportedModel(name, task, architecture))
    return (*(found[name] for name in sorted(found)), *supported_models(TIMM_TABLE))
