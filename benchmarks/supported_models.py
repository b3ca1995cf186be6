"""Try mm_hf on a tiny random model of every classification class of Transformers; write docs/models.md and the package's table.

For each class: plain MultiMix, manifold mixup, the probe and its plan, the identity on a fresh padded batch of another size,
the attention against what eager attention reports, a training step by the locations' loss alone (gradients reach the first
layer and all of the head), and a checkpoint that loads as a plain model. The table is what `mm-hf models` shows.

    python benchmarks/supported_models.py [--classes ViTForImageClassification ...]       (or: make model-table)
"""

import argparse
import collections
import copy
import math
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from mm_hf import DenseMultiMix, ManifoldMixup, MultiMix, extract, wrap_model  # noqa: E402
from mm_hf.data.supported_models import TABLE, SupportedModel, write_supported_models  # noqa: E402
from mm_hf.evaluation.model_check import pooled_error  # noqa: E402
from mm_hf.locations import LocationError, probe, resolve_attention  # noqa: E402
from mm_hf.locations.pools import pool_rows  # noqa: E402
from mm_hf.locations.recording import logits_of  # noqa: E402
from mm_hf.locations.tolerance import relative_error  # noqa: E402
from tests.helpers import zoo  # noqa: E402

LONGER = {"reformer": {"length": 64, "padding": None}}  # in training it takes texts of one length only


@dataclass
class Row:
    """What was found of one class; errors are relative, and None where nothing is to be compared."""

    name: str
    multimix: bool = False
    dense: bool = False
    blocks: bool = False
    auto: str = ""
    pool: str = ""
    head: str = ""
    identity: float | None = None
    attention: str = ""
    attention_error: float | None = None
    trained: bool = False
    reason: str = ""
    unavailable: bool = False


def check(name: str) -> Row:
    """Everything about one class."""
    row = Row(name)
    try:
        model = zoo.build(name)
    except zoo.Unavailable as error:
        row.reason, row.unavailable = str(error), True
        return row
    inputs = zoo.batch(name, model, **LONGER.get(model.config.model_type, {}))
    reached: list[str] = []
    row.multimix, row.reason = step(model, inputs, MultiMix(num_mixed=20), reached)
    row.blocks = mixed_inside(name, model)
    try:
        plan = probe(model, inputs)
    except LocationError as error:
        row.reason = row.reason or str(error).splitlines()[0]
        return row
    fresh = zoo.batch(name, model, b=3, seed=5, length=9)
    kind = "uniform" if plan.attention is None else "mean" if plan.query == "mean" else "cls"
    with torch.no_grad():
        seen = extract(model, attention=kind, **fresh)
    row.identity, _ = pooled_error(model, plan, fresh)
    row.auto = resolve_attention("auto", plan)
    row.dense, row.pool, row.head = row.identity <= 1e-5, plan.pool, " → ".join(plan.chain) or "scores every token"
    if plan.attention is not None:
        row.attention = f"{'all tokens' if kind == 'mean' else 'one token'}, {plan.attention_base}"
        row.attention_error = attention_error(model, plan, kind, fresh, seen)
    # The locations' term alone must train all of the head and the backbone from its first layer on.
    by_dense: list[str] = []
    row.trained, reason = step(model, inputs, DenseMultiMix(num_mixed=20, clean_weight=0.0), by_dense)
    missed = sorted({reached[0], *head_parameters(model, plan)} - set(by_dense))
    if row.trained and missed:
        row.trained, reason = False, f"no gradient reaches {', '.join(missed)}"
    row.reason = row.reason or reason
    return row


def attention_error(model, plan, kind, inputs, seen):
    """Largest difference to the row that eager attention reports; None if the model reports none of these dimensions."""
    eager = copy.deepcopy(model)
    try:
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            output = eager(**inputs, output_attentions=True)
    except Exception:  # a model that cannot report them
        return None
    n = seen.mask.shape[1] + plan.prefix
    reported = [output.get("decoder_attentions") or output.get("attentions") or ()]
    layers = [
        a for a in reported[0] if isinstance(a, torch.Tensor) and a.shape[-2:] == (n, n) and len(a) == len(seen.mask)
    ]
    if not layers or (layers[-1].sum(-1) - 1).abs().max() > 1e-3:  # SqueezeBERT reports scores
        return None
    weights = layers[-1].flatten(1, -3).mean(dim=1)
    if kind == "mean":
        expected = weights.mean(dim=1)
    elif plan.query == "pool":
        ids = inputs["input_ids"]
        rows = pool_rows(ids[..., None], plan.pool, inputs).int().argmax(dim=1)
        expected = weights[torch.arange(len(weights)), rows]
    else:
        expected = weights[:, plan.query]
    expected = expected[:, plan.prefix :] * seen.mask
    expected = expected / expected.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return float((seen.attention - expected).abs().max())


def mixed_inside(name, model):
    """Whether manifold mixup trains the model: on texts padded on the left, so that a last token is last in both of a pair."""
    model = copy.deepcopy(model)
    inputs = zoo.batch(name, model, **LONGER.get(model.config.model_type, {"padding": "left"}))
    if hasattr(model.config, "layerdrop"):
        model.config.layerdrop = 0.0
    return step(model, inputs, ManifoldMixup(), [])[0]


def step(model, inputs, mixing, reached):
    """One training step and a checkpoint: whether all went well, and if not what did not.

    `reached` is filled with the names of the parameters that get a gradient, in the model's order.
    """
    model = copy.deepcopy(model).train()
    labels = torch.arange(len(next(iter(inputs.values())))) % model.config.num_labels
    torch.manual_seed(0)
    try:
        with wrap_model(model, mixing):
            loss = model(**inputs, labels=labels)["loss"]
            loss.backward()
    except LocationError as error:
        return False, str(error).splitlines()[0]
    if not loss.isfinite():
        return False, "the loss is not finite"
    reached += [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        model.eval().save_pretrained(directory)
        loaded = type(model).from_pretrained(directory).eval()
        if relative_error(logits_of(loaded(**inputs)), logits_of(model(**inputs))) > 1e-5:
            return False, "the checkpoint gives other logits"
    return True, ""


def head_parameters(model, plan):
    """Names of all parameters of the modules from a token to its logits."""
    modules = dict(model.named_modules())
    steps = [name for s in plan.chain for name in s.split("+") if name in modules]
    return [f"{s}.{name}" for s in steps for name, p in model.get_submodule(s).named_parameters() if p.requires_grad]


def table(rows, seconds):
    """docs/models.md."""
    number = lambda x: "" if x is None else "exact" if x == 0 else f"1e{math.ceil(math.log10(x))}"  # noqa: E731
    count = collections.Counter()
    for row in rows:
        count["multimix"] += row.multimix
        count["dense"] += row.dense and row.trained
        count["blocks"] += row.blocks
        count["attention"] += bool(row.attention)
        count["compared"] += row.attention_error is not None
        count["equal"] += row.attention_error is not None and row.attention_error <= 1e-4
    lines = [
        "# Models",
        "",
        f"Written by `make model-table` ({seconds:.0f} s of one CPU core): tiny random models of all "
        f"{len(rows)} classes of the four auto mappings for sequence, image, audio and video classification in Transformers "
        f"{transformers.__version__}, each probed without knowledge of its architecture.",
        "",
        "| what | classes |",
        "|---|---|",
        f"| MultiMix trains | {count['multimix']} of {len(rows)} |",
        f"| Dense MultiMix trains: per-location logits reproduce the model's to 1e-5 on another batch, gradients reach the "
        f"first layer and all of the head, the checkpoint is a plain model | {count['dense']} |",
        f"| ManifoldMixup finds the blocks and trains | {count['blocks']} |",
        f"| attention can be read | {count['attention']}; of these {count['compared']} report eager attention to compare "
        f"with, and {count['equal']} equal it to 1e-4 |",
        "",
        "`attention` says whose is read (the one token that the head reads, or the mean of all) and where: an attention "
        "implementation's row is computed anew from query and keys; `(weights)` are those that the eager function reports; "
        '`softmax[k]` is the k-th call inside the module. Without it, `attention="gap"`, `"cam"` and `"uniform"` work. '
        "Errors are orders of magnitude, rounded up.",
        "",
        "| class | Dense | pool | head | identity | attention | against eager |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.dense and r.trained:
            cells = [
                "yes",
                f"`{r.pool}`".replace("|", "\\|"),
                f"`{r.head}`",
                number(r.identity),
                r.attention,
                number(r.attention_error),
            ]
            lines.append(f"| {r.name} | " + " | ".join(cells) + " |")
        else:
            lines.append(f"| {r.name} | {'MultiMix only' if r.multimix else 'no'}: {r.reason} | | | | | |")
    return "\n".join(lines) + "\n"


def coverage_of(row) -> SupportedModel:
    """A row of the package's table."""
    return SupportedModel(
        row.name, zoo.TASKS[row.name], architecture(row.name), row.multimix, row.dense and row.trained, row.blocks,
        row.auto, row.pool, row.head, row.reason.split(". Tried were")[0], "" if row.unavailable else transformers.__version__,
    )  # fmt: skip


def architecture(name: str) -> str:
    """The `model_type` of a class."""
    of = ((kind, names) for mapping in zoo.MAPPINGS.values() for kind, names in mapping.items())
    return next(kind for kind, names in of if name in ([names] if isinstance(names, str) else names))


def main() -> None:
    """Check all classes and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+")
    names = parser.parse_args().classes or zoo.class_names()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # the models are too small for more
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start, rows = time.process_time(), []
    for name in names:
        rows.append(check(name))
        print({k: v for k, v in asdict(rows[-1]).items() if v not in ("", None)}, flush=True)
    text = table(rows, time.process_time() - start)
    if len(names) == len(zoo.class_names()):
        (ROOT / "docs" / "models.md").write_text(text)
        write_supported_models(map(coverage_of, rows), TABLE)
    print("\n".join(text.splitlines()[4:10]))


if __name__ == "__main__":
    main()
