"""What a comparison found, in words, tables and pictures."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from ..compare import Comparison
from .figures import draw
from .render import Block, Cell, Code, Document, Findings, Picture, Section, Table, Text, as_html, as_markdown
from .tables import GROUPS, MAIN, METRICS

FOUND = "What the 95 % intervals of the differences say, where they exclude zero:"


def write_report(comparison: Comparison, directory: str | Path) -> Path:
    """Write `report.html`, `report.md` and `pictures/` into a directory.

    Returns:
        The path of `report.html`, which needs no other file.
    """
    directory = Path(directory)
    pictures = draw(comparison, directory / "pictures")
    document = Document(_title(comparison), _sections(comparison, pictures))
    (directory / "report.md").write_text(as_markdown(document, directory), encoding="utf-8")
    path = directory / "report.html"
    path.write_text(as_html(document), encoding="utf-8")
    return path


def _title(comparison: Comparison) -> str:
    if len(comparison.runs) > 1:
        return f"Mixing methods on {comparison.name}"
    return f"{next(iter(comparison.runs))} on {comparison.name}"


def _sections(comparison: Comparison, pictures: dict[str, Picture]) -> list[Section]:
    def shown(*names: str) -> list[Block]:
        return [pictures[name] for name in names if name in pictures]

    summary: list[Block] = [Findings(findings(comparison))]
    if comparison.differences:
        summary.insert(0, Text(FOUND))
    sections = [
        Section("", [Text(_lead(comparison), lead=True), *summary, *shown("differences")]),
        Section("Accuracy and calibration", [*_main(comparison), *shown("reliability")]),
    ]
    if any(comparison.values(metric) for metric in GROUPS["robustness"]):
        intro = (
            f"On {_samples(comparison)} test images: accuracy after one step of FGSM "
            f"(largest change of a pixel {_epsilon(comparison)}), and the mean over eight corruptions in five severities."
        )
        sections.append(Section("Robustness", [Text(intro), _table(comparison, "robustness"), *shown("corruptions")]))
    if any(comparison.values(metric) for metric in GROUPS["ood"]):
        intro = (
            f"{comparison.settings.get('task', {}).get('unknown_examples', 'Some')} examples of classes that the training "
            "did not have are to be told from the test examples by how sure the model is: AUROC is 50 % for a guess and "
            "100 % at best, FPR95 the share of unknown examples that pass where 95 % of the known ones do."
        )
        sections.append(Section("Unknown classes", [Text(intro), _table(comparison, "ood"), *shown("ood")]))
    if any(comparison.values(metric) for metric in GROUPS["representation"]):
        intro = (
            "Of the vectors that the last layer reads, on the unit sphere. Class spread is the distance within classes "
            "divided by that between classes."
        )
        blocks = [Text(intro), _table(comparison, "representation"), *shown("embeddings", "alignment_uniformity")]
        sections.append(Section("Embedding space", blocks))
    if any(comparison.values(metric) for metric in GROUPS["cost"]):
        memory = (
            "what torch allocated on the GPU at most"
            if torch.cuda.is_available()
            else "by how much the process grew. Memory freed by an earlier run is used again unseen: a lower bound, and noise for "
            "models of a few megabytes"
        )
        intro = f"Training time is without evaluations and checkpoints. Peak memory is {memory}."
        sections.append(Section("Cost", [Text(intro), _table(comparison, "cost"), *shown("cost", "training")]))
    sections.append(Section("How this was made", _made(comparison)))
    return sections


def _lead(comparison: Comparison) -> str:
    task, n, methods = comparison.settings.get("task", {}), len(comparison.seeds), len(comparison.runs)
    size = f"{task['test_examples']:,} test examples" if "test_examples" in task else "the test examples"
    model = f"{task['model']} with {task['parameters']:,} parameters" if "model" in task else "The model"
    if len(comparison.runs) == 1 and comparison.baseline is None:
        return f"{model}, on {size}."
    training = f", trained on {task['training_examples']:,} examples" if "training_examples" in task else ""
    return (
        f"{model}{training} and tested on {size}: "
        f"{methods} method{'s' * (methods > 1)}, {n} seed{'s' * (n > 1)} each. For a seed, all methods start from the "
        "same weights and see the same batches in the same order."
    )


def findings(comparison: Comparison) -> list[str]:
    """What the comparison says, in sentences; nothing is said of differences whose interval holds zero."""
    if len(comparison.runs) == 1:
        (name,) = comparison.runs
        figures = [
            f"{METRICS[m].noun} {METRICS[m].mean(comparison.mean(m)[name])}{METRICS[m].unit}"
            for m in MAIN
            if comparison.mean(m)
        ]
        return [f"{name}: {_listed(figures)}.", *_failures(comparison)]
    sentences, baseline = [], comparison.baseline
    for name in comparison.runs:
        if name == baseline:
            continue
        if any(
            comparison.differences[metric][name].value != comparison.differences[metric][name].value for metric in MAIN
        ):
            sentences.append(
                f"{name}: some figures are not numbers, as when a training diverges, and are not compared."
            )
            continue
        gains: dict[bool, list[str]] = {True: [], False: []}
        for metric in MAIN:
            interval = comparison.differences[metric][name]
            if interval.excludes_zero:
                shown = METRICS[metric]
                gains[shown.helps(interval)].append(
                    f"{shown.noun} ({shown.number(interval.value, sign=True)}{shown.points})"
                )
        if not gains[True] and not gains[False]:
            sentences.append(f"{name}: no difference from {baseline} whose 95 % interval excludes zero.")
            continue
        parts = [f"{word} {_listed(each)}" for word, each in (("better", gains[True]), ("worse", gains[False])) if each]
        sentences.append(f"{name}, compared with {baseline}: {'; '.join(parts)}.")
    sentences += _failures(comparison)
    if len(comparison.seeds) == 1:
        sentences.append(
            "With one seed, the intervals say how other test examples would come out, and nothing of other trainings."
        )
    return sentences


def _failures(comparison: Comparison) -> list[str]:
    return [f"{name} was not trained: {why.splitlines()[0]}" for name, why in comparison.failed.items()]


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _main(comparison: Comparison) -> list[Block]:
    metrics = [*MAIN, "macro_f1"]
    n = len(comparison.seeds)
    rows = [
        [Cell(name), *(Cell(METRICS[m].mean(comparison.mean(m)[name])) for m in metrics)] for name in comparison.runs
    ]
    said = f"Mean over {n} seeds ± half of Student's 95 % interval." if n > 1 else "One seed."
    blocks: list[Block] = [Table(["Method", *(METRICS[m].heading for m in metrics)], rows, f"Test examples. {said}")]
    if comparison.differences:
        rows = []
        for name in comparison.runs:
            if name == comparison.baseline:
                continue
            cells = [Cell(name)]
            for metric in MAIN:
                interval, shown = comparison.differences[metric][name], METRICS[metric]
                mark = ("better" if shown.helps(interval) else "worse") if interval.excludes_zero else ""
                cells.append(Cell(shown.difference(interval), mark))
            rows.append(cells)
        caption = (
            f"Difference from {comparison.baseline} [95 % interval of the paired bootstrap]. Marked where it excludes zero: "
            "green better, red worse."
        )
        blocks.append(Table(["Method", *(METRICS[m].heading for m in MAIN)], rows, caption))
    return blocks


def _table(comparison: Comparison, group: str) -> Table:
    metrics = [metric for metric in GROUPS[group] if comparison.values(metric)]
    means = {metric: comparison.mean(metric) for metric in metrics}
    rows = [
        [Cell(name), *(Cell(METRICS[m].mean(means[m][name]) if name in means[m] else "n/a") for m in metrics)]
        for name in comparison.runs
    ]
    n = len(comparison.seeds)
    caption = f"Mean over {n} seeds ± half of Student's 95 % interval." if n > 1 else ""
    return Table(["Method", *(METRICS[m].heading for m in metrics)], rows, caption)


def _samples(comparison: Comparison) -> Any:
    most = comparison.settings.get("measures", {}).get("robustness_samples", 0)
    return f"{min(most, comparison.settings.get('task', {}).get('test_examples', most)):,}"


def _epsilon(comparison: Comparison) -> str:
    epsilon = 255 * comparison.settings.get("measures", {}).get("epsilon", 0.0)
    return f"{epsilon:.3g}/255"


def _made(comparison: Comparison) -> list[Block]:
    from ... import __version__

    notes = sorted({note for runs in comparison.runs.values() for run in runs for note in run.notes})
    blocks: list[Block] = [Text(note) for note in notes]
    if comparison.differences:
        seeds = (
            "draws seeds and test examples with replacement, the same for both methods,"
            if len(comparison.seeds) > 1
            else "draws test examples with replacement, the same for both methods,"
        )
        blocks.append(
            Text(
                f"Intervals of differences: each of {comparison.replicates:,} replicates {seeds} and the ends are the 2.5th and "
                "97.5th percentiles. They are not corrected for looking at several methods and figures: of twenty "
                "comparisons of methods that are equal, one excludes zero on average. Few seeds tell little of the spread "
                "between seeds."
            )
        )
    if len(comparison.runs) > 1 or comparison.baseline is not None:
        blocks.append(
            Text(
                "Test examples were predicted once for each run, by the model at the end of its training, and chose nothing. "
                "Each run is in `runs/`, with logits, labels and features of the test examples; all figures are in `results.csv`."
            )
        )
    rows = [
        [Cell(name), Cell(", ".join(f"{k}={v}" for k, v in method.to_dict().items()), "text")]
        for name, method in comparison.methods.items()
        if method is not None
    ]
    if rows:
        blocks.append(Table(["Method", "Settings"], rows))
    settings = {k: v for k, v in comparison.settings.items() if k != "methods"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in settings.items()]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lines.append(
        f"versions: mm_hf {__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {where}"
    )
    blocks.append(Code("\n".join(lines)))
    return blocks
