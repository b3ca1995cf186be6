"""Try mm_hf on one small random model of every family of timm, in Transformers' `TimmWrapperForImageClassification`.

A family has the models of one module whose names begin with the same letters; its model with the fewest parameters is
tried. The checks are those of benchmarks/supported_models.py without checkpoints. Writes docs/timm_models.md and the
table of `mm-hf models` when all families are tried. An interrupted run is continued: its rows are in
outputs/timm_models.csv, which a complete run removes. With `--families`, the rows of the other families are kept.

    python benchmarks/timm_models.py [--families vision_transformer/vit ...]        (or: make model-table)
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.supported_models import check_model, supported_model  # noqa: E402
from mm_hf.data.supported_models import (  # noqa: E402
    TIMM_TABLE,
    SupportedModel,
    supported_models,
    write_supported_models,
)
from tests.helpers import timm_zoo  # noqa: E402

STARTED = ROOT / "outputs" / "timm_models.csv"  # rows of a run of all families, until it is complete

PAGE = """# Models of timm

Written by `make model-table` from one small random model of {families} of timm {timm}'s {all} families, in Transformers
{transformers}'s `TimmWrapperForImageClassification`. The probe has no knowledge of an architecture.

| what | families |
|---|---|
| MultiMix trains the model | {multimix} of {families} |
| Dense MultiMix trains it: per-location logits reproduce its logits to 1e-5 on another batch, and gradients \
reach the first layer and all of the head | {dense} |
| ManifoldMixup finds the blocks and trains the model | {blocks} |
| the attention can be read | {attention} |

| model | MultiMix | Dense | ManifoldMixup | pool | head | attention |
|---|---|---|---|---|---|---|
"""


def check(name: str, family: str) -> SupportedModel:
    """Run all checks of one model, with larger and larger images until Dense MultiMix trains it."""
    row, reason = None, ""
    for side in timm_zoo.SIDES:
        try:
            model = timm_zoo.build(name, side)
        except timm_zoo.BUILD_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        tried = check_model(f"timm/{name}", model, timm_zoo.batches(model, side), reload=False)
        if row is None or tried.dense:
            row = tried
        if tried.dense and tried.trained:
            break
    if row is None:
        return SupportedModel(f"timm/{name}", "image", family, reason=f"It cannot be built: {reason}")
    return supported_model(row, "image", family)


def page(rows: list[SupportedModel]) -> str:
    """Return docs/timm_models.md."""
    import timm

    yes = lambda value: "yes" if value else "no"  # noqa: E731
    lines = []
    for r in rows:
        pool = f"`{r.pool}`".replace("|", "\\|") if r.dense_multimix else r.reason
        head = f"`{r.head}`" if r.dense_multimix else ""
        flags = [yes(flag) for flag in (r.multimix, r.dense_multimix, r.manifold_mixup)]
        lines.append(f"| {' | '.join([r.name, *flags, pool, head, 'yes' if r.attention_readable else ''])} |\n")
    introduction = PAGE.format(
        timm=timm.__version__, transformers=transformers.__version__, families=len(rows), all=len(timm_zoo.families()),
        multimix=sum(r.multimix for r in rows), dense=sum(r.dense_multimix for r in rows),
        blocks=sum(r.manifold_mixup for r in rows), attention=sum(r.attention_readable for r in rows),
    )  # fmt: skip
    return introduction + "".join(lines)


def read(table: Path) -> dict[str, SupportedModel]:
    """Return the rows of a table by family; none if there is no table."""
    return {row.architecture: row for row in supported_models(table)} if table.exists() else {}


def main() -> None:
    """Check the models and write the table and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+")
    chosen = parser.parse_args().families
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # The models are too small for more.
    transformers.logging.set_verbosity_error()
    earlier, families = read(TIMM_TABLE), timm_zoo.families()
    rows = dict(earlier) if chosen else read(STARTED)
    STARTED.parent.mkdir(exist_ok=True)
    left = sorted(families.keys() - rows.keys(), key=lambda family: (family in earlier, family))  # new families first
    for family in chosen or left:
        known = earlier[family].name.removeprefix("timm/") if family in earlier else None
        name = known if known in families[family] else timm_zoo.smallest(families[family])
        rows[family] = check(name, family)
        print(rows[family], flush=True)
        if not chosen:
            write_supported_models(rows.values(), STARTED)
    ordered = [rows[key] for key in sorted(rows) if key in families]
    write_supported_models(ordered, TIMM_TABLE)
    (ROOT / "docs" / "timm_models.md").write_text(page(ordered))
    if not chosen:
        STARTED.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
