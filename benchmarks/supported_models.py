"""Try mm_hf on a tiny random model of every classification class of Transformers.

For each class: MultiMix, manifold mixup, the probe and its plan, the plan's logits on a fresh padded batch of another
size, the attention against eager attention, a training step with the locations' loss alone (gradients must reach the
first layer and all of the head), and a checkpoint that loads as a plain model. Writes docs/models.md and the table of
`mm-hf models`.

    python benchmarks/supported_models.py [--classes ViTForImageClassification ...]       (or: make model-table)
"""

import argparse
import collections
import copy
import functools
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from mm_hf import DenseMultiMix, ManifoldMixup, MultiMix, extract, wrap_model  # noqa: E402
from mm_hf.data.supported_models import TABLE, SupportedModel, write_supported_models  # noqa: E402
from mm_hf.evaluation.model_check import pooled_error  # noqa: E402
from mm_hf.locations import LocationError, probe, resolve_attention  # noqa: E402
from mm_hf.locations.attention.weights import num_groups, row_of_tokens  # noqa: E402
from mm_hf.locations.candidates import source_of  # noqa: E402
from mm_hf.locations.plan import as_tokens  # noqa: E402
from mm_hf.locations.pools import MODULE_POOL, pool_rows  # noqa: E402
from mm_hf.locations.recording import logits_of, record  # noqa: E402
from mm_hf.locations.tolerance import relative_error  # noqa: E402
from tests.helpers import zoo  # noqa: E402

LONGER = {"reformer": {"length": 64, "padding": None}}  # accepts texts of one length only in training
INTRODUCTION = """# Models

Written by `make model-table` ({seconds:.0f} s on one CPU core) from tiny random models of all {classes} classes in
Transformers {version}'s four auto mappings for sequence, image, audio and video classification. The probe has no
knowledge of an architecture.

| what | classes |
|---|---|
| MultiMix trains the model | {multimix} of {classes} |
| Dense MultiMix trains the model: the per-location logits reproduce its logits to 1e-5 on another batch, gradients \
reach the first layer and all of the head, and the checkpoint loads as a plain model | {dense} |
| ManifoldMixup finds the blocks and trains the model | {blocks} |
| the attention can be read | {attention}; {compared} of these report eager attention, and {equal} equal it to 1e-4 |

The column `attention` names the token whose attention is read (the one token that the head reads, or the mean over all
tokens) and its source. For an attention implementation such as `sdpa`, one row is computed from query and keys;
`(weights)` are the weights that the eager function returns; `softmax[k]` is the k-th call of softmax in the module.
Where none can be read, the column states what was recorded, and `attention="gap"`, `"cam"` and `"uniform"` work. Errors
are rounded up to powers of ten.

| class | Dense | pool | head | identity | attention | against eager |
|---|---|---|---|---|---|---|
"""


@dataclass
class Row:
    """Results of one class. Errors are relative, and None if there is no reference."""

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
    unread: str = ""
    trained: bool = False
    reason: str = ""
    unavailable: bool = False


def check(name: str) -> Row:
    """Run all checks of one class."""
    try:
        model = zoo.build(name)
    except zoo.Unavailable as error:
        return Row(name, reason=str(error), unavailable=True)
    return check_model(name, model, functools.partial(zoo.batch, name, model))


def check_model(name: str, model: Any, batch: Callable[..., dict[str, Any]], reload: bool = True) -> Row:
    """Run all checks of one model.

    Args:
        name: Name of the row.
        model: The model.
        batch: Function that makes inputs, with the keyword arguments of `zoo.batch`.
        reload: Save and load a checkpoint after each step.
    """
    row = Row(name)
    inputs = batch(**LONGER.get(model.config.model_type, {}))
    reached: list[str] = []
    row.multimix, row.reason = step(model, inputs, MultiMix(num_mixed=20), reached, reload)
    row.blocks = trains_with_mixed_blocks(model, batch, reload)
    try:
        plan = probe(model, inputs)
    except LocationError as error:
        row.reason = row.reason or first_line(error)
        return row
    fresh = batch(b=3, seed=5, length=9)
    kind = "uniform" if plan.attention is None else "mean" if plan.query == "mean" else "cls"
    with torch.no_grad():
        output = extract(model, attention=kind, **fresh)
    row.identity, _ = pooled_error(model, plan, fresh)
    row.auto = resolve_attention("auto", plan)
    row.dense, row.pool, row.head = row.identity <= 1e-5, plan.pool, " → ".join(plan.chain) or "scores every token"
    if plan.attention is not None:
        row.attention = f"{'all tokens' if kind == 'mean' else 'one token'}, {plan.attention_base}"
        row.attention_error = attention_error(model, plan, kind, fresh, output)
    else:
        row.unread = unread_attention(model, plan, inputs)
    # The loss of the locations alone must train the complete head and the backbone from its first layer on.
    by_dense: list[str] = []
    # Attention to a single token has weight 1: the query of a pooling module learns from the weights of the labels.
    dense = DenseMultiMix(num_mixed=20, clean_weight=0.0, detach_attention=plan.pool != MODULE_POOL)
    row.trained, reason = step(model, inputs, dense, by_dense, reload)
    # The first layer and not a CLS token, which blocks with class attention do not mix into the locations.
    first = next((name for name in reached if name.endswith("weight")), reached[0])
    missed = sorted({first, *head_parameters(model, plan)} - set(by_dense))
    if row.trained and missed:
        row.trained, reason = False, f"no gradient reaches {', '.join(missed)}"
    row.reason = row.reason or reason
    return row


def attention_error(model, plan, kind, inputs, output):
    """Return the largest difference to the row of eager attention, or None if there is none of the same shape."""
    if plan.pool == MODULE_POOL:  # The model reports the attention of its blocks and not that of its head.
        return None
    eager = copy.deepcopy(model)
    try:
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            expected_output = eager(**inputs, output_attentions=True)
    except Exception:  # The model cannot return attention.
        return None
    b, n = len(output.mask), output.mask.shape[1] + plan.prefix
    reported = expected_output.get("decoder_attentions") or expected_output.get("attentions") or ()
    # Each key is upsampled to as many tokens, or stands for one in each group with a copy of the first token, or a
    # decoder attends to the tokens of its encoder, too.
    repeat, groups = int(plan.keys[7:-1]) if plan.keys.startswith("repeat") else 1, num_groups(plan.keys)
    own = n // repeat if groups == 1 else (n - 1) // groups + 1
    shapes = [(own, own), (n, 2 * n)]
    layers = [a for a in reported if isinstance(a, torch.Tensor) and a.shape[-2:] in shapes and len(a) == b * groups]
    if not layers or (layers[-1].sum(-1) - 1).abs().max() > 1e-3:  # SqueezeBERT returns scores
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
    expected = row_of_tokens(expected[:, :own], n, plan.keys)[:, plan.prefix :] * output.mask
    expected = expected / expected.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return float((output.attention - expected).abs().max())


def unread_attention(model, plan, inputs):
    """Return the reason why no attention can be read: what one forward computed."""
    with torch.inference_mode(False), torch.enable_grad():
        recording = record(model, inputs)
        source = source_of(recording, plan)
    calls, tokens = recording.attention_calls, as_tokens(source, plan.layout).shape[1]
    if not calls:
        return "no: no softmax is computed"
    queries, keys = calls[-1].queries, calls[-1].keys
    return f"no: the head reads from {tokens} tokens; the last softmax has ({queries}, {keys}) queries and keys"


def trains_with_mixed_blocks(model, batch, reload=True):
    """Return True if manifold mixup trains the model.

    Texts are padded on the left, so that the last tokens of the two examples of a pair are at the same position.
    """
    model = copy.deepcopy(model)
    inputs = batch(**LONGER.get(model.config.model_type, {"padding": "left"}))
    if hasattr(model.config, "layerdrop"):
        model.config.layerdrop = 0.0
    return step(model, inputs, ManifoldMixup(), [], reload)[0]


def step(model, inputs, mixing, reached, reload=True):
    """Train one step, save a checkpoint and load it.

    Args:
        model: The model, of which a copy is trained.
        inputs: Keyword arguments of its forward.
        mixing: The method.
        reached: A list to which the names of the parameters with a gradient are added, in the model's order.
        reload: Save the checkpoint and load it.

    Returns:
        Whether everything succeeded, and the reason if not.
    """
    model = copy.deepcopy(model).train()
    labels = torch.arange(len(next(iter(inputs.values())))) % model.config.num_labels
    torch.manual_seed(0)
    try:
        with wrap_model(model, mixing):
            loss = model(**inputs, labels=labels)["loss"]
            loss.backward()
    except LocationError as error:
        return False, first_line(error)
    if not loss.isfinite():
        return False, "the loss is not finite"
    reached += [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    if not reload:
        return True, ""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        model.eval().save_pretrained(directory)
        loaded = type(model).from_pretrained(directory).eval()
        if relative_error(logits_of(loaded(**inputs)), logits_of(model(**inputs))) > 1e-5:
            return False, "the loaded checkpoint gives other logits"
    return True, ""


def first_line(error):
    """Return the first line of an error's message without its period."""
    return str(error).splitlines()[0].rstrip(".")


def head_parameters(model, plan):
    """Return the names of all parameters of the modules from a token to its logits."""
    modules = dict(model.named_modules())
    steps = [name for s in plan.chain for name in s.split("+") if name in modules]
    return [f"{s}.{name}" for s in steps for name, p in model.get_submodule(s).named_parameters() if p.requires_grad]


def introduction(rows, seconds):
    """Return docs/models.md up to its second table."""
    count = collections.Counter()
    for row in rows:
        count["multimix"] += row.multimix
        count["dense"] += row.dense and row.trained
        count["blocks"] += row.blocks
        count["attention"] += bool(row.attention)
        count["compared"] += row.attention_error is not None
        count["equal"] += row.attention_error is not None and row.attention_error <= 1e-4
    return INTRODUCTION.format(seconds=seconds, classes=len(rows), version=transformers.__version__, **count)


def table(rows, seconds):
    """Return docs/models.md."""
    number = lambda x: "" if x is None else "exact" if x == 0 else f"1e{math.ceil(math.log10(x))}"  # noqa: E731
    lines = []
    for r in rows:
        if r.dense and r.trained:
            cells = [
                "yes",
                f"`{r.pool}`".replace("|", "\\|"),
                f"`{r.head}`",
                number(r.identity),
                r.attention or r.unread,
                number(r.attention_error),
            ]
            lines.append(f"| {r.name} | " + " | ".join(cells) + " |")
        else:
            lines.append(f"| {r.name} | {'MultiMix only' if r.multimix else 'no'}: {r.reason} | | | | | |")
    return introduction(rows, seconds) + "\n".join(lines) + "\n"


def supported_model(row: Row, task: str | None = None, family: str | None = None) -> SupportedModel:
    """Convert to a row of the package's table; the task and the architecture of a class are those of the mappings."""
    return SupportedModel(
        row.name, task or zoo.TASKS[row.name], family or architecture(row.name), row.multimix,
        row.dense and row.trained, row.blocks, row.auto, bool(row.attention), row.pool, row.head, row.reason,
        "" if row.unavailable else transformers.__version__,
    )  # fmt: skip


def architecture(name: str) -> str:
    """Return the `model_type` of a class."""
    architectures = ((kind, names) for mapping in zoo.MAPPINGS.values() for kind, names in mapping.items())
    return next(kind for kind, names in architectures if name in ([names] if isinstance(names, str) else names))


def main() -> None:
    """Check all classes and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+")
    names = parser.parse_args().classes or zoo.class_names()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # The models are too small for more.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start, rows = time.process_time(), []
    for name in names:
        rows.append(check(name))
        print({k: v for k, v in asdict(rows[-1]).items() if v not in ("", None)}, flush=True)
    text = table(rows, time.process_time() - start)
    if len(names) == len(zoo.class_names()):
        (ROOT / "docs" / "models.md").write_text(text)
        write_supported_models(map(supported_model, rows), TABLE)
    print("\n".join(text.splitlines()[4:10]))


if __name__ == "__main__":
    main()
