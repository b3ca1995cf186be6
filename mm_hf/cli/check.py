"""Try a model: the methods that train it, the assumptions of mixing, and the cost of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..data.options import check_path
from ..methods.settings import required_settings, setting
from ._methods import check_method
from ._option_files import expand_arguments
from ._options import make_parser, parse, quiet, take

if TYPE_CHECKING:
    import torch

    from ..evaluation.model_check import ModelCheck

USAGE = "mm-hf check MODEL [OPTIONS.yaml] [--task image|text|audio] [--mixing METHOD] [options]"
DESCRIPTION = """Loads MODEL (a directory or a Hub name), generates a small batch and reports whether logits computed
from the locations equal the model's own, whether mixing features equals mixing logits, which methods train the
model, and what a step of each costs. Exit code 0: --mixing trains it; 1: it does not; 2: the arguments are invalid.

example:
  mm-hf check google/vit-base-patch16-224"""
EPILOG = """The batch is noise or a few sentences. The model is unchanged, and no files are written. In Python:
mm_hf.check_model(model, batch)."""
ATTENTION = {
    "cls": "the attention of the token that the head reads",
    "gap": "the similarity of a location's features to their mean",
    "uniform": "the same for every location",
}


@dataclass
class CheckOptions:
    """Options of `mm-hf check`."""

    model: str | None = field(default=None, metadata={"help": "Directory or Hub name; the same as MODEL."})
    task: Literal["image", "text", "audio"] | None = field(
        default=None, metadata={"help": "Kind of the model's inputs. Default: from its configuration."}
    )
    mixing: str = field(default="dense_multimix", metadata={"help": "The method that decides the exit code."})
    batch_size: int = setting(8, "Examples in the batch; the cost of a step depends on it.", within="[2, inf)")
    rounds: int = setting(5, "Timed steps per method; 0: none.", within="[0, inf)")
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ... Default: a GPU if there is one."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Directory of downloaded files."})
    token: str | None = field(default=None, metadata={"help": "Hub token. Default: that of `hf auth login`."})


def main(arguments: Sequence[str]) -> int:
    """Check a model; return 0 if the method trains it, else 1."""
    parser = make_parser("mm-hf check", USAGE, DESCRIPTION, EPILOG, trains=False, check=CheckOptions)
    options = take(parse(parser, expand_arguments(arguments, "--model"), "mm-hf check", {}), CheckOptions)
    if options.model is None:
        raise ValueError("MODEL is missing: mm-hf check MODEL, a directory or a Hub name.")
    required = required_settings(check_method(options.mixing))
    if required:
        raise ValueError(
            f"--mixing {options.mixing} requires {', '.join(required)}, and mm-hf check tries the methods with their "
            "default settings: choose another one."
        )
    check_path("model", options.model)
    return _check(options)


def _check(options: CheckOptions) -> int:
    import torch
    import transformers

    from ..data.dummy_inputs import detect_task, example_batch, load
    from ..evaluation.model_check import check_model

    quiet()
    transformers.utils.logging.set_verbosity_error()
    hub = {"revision": options.model_revision, "cache_dir": options.cache_dir, "token": options.token}
    name = str(options.model)
    task = options.task or detect_task(name, **hub)
    model, processor = load(name, task, **hub)
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    batch, other = (
        example_batch(model, processor, task, size, seed) for seed, size in enumerate((options.batch_size, 3))
    )
    result = check_model(
        model, batch, other_inputs=other, rounds=options.rounds, processing_class=processor if task == "text" else None
    )
    print(heading(name, model, batch), "", sep="\n")
    print(*summary(result, options.mixing, model.dtype), "", *cost_table(result), sep="\n")
    return 1 if result.problems[options.mixing] else 0


def heading(name: str, model: Any, batch: dict[str, torch.Tensor]) -> str:
    """Describe the model and the batch in one line."""
    shapes = ", ".join(f"{k} {' x '.join(map(str, v.shape))}" for k, v in batch.items() if k != "labels")
    size = sum(p.numel() for p in model.parameters())
    return (
        f"{type(model).__name__} of {name}: {size / 1e6:.3g} million parameters in {str(model.dtype)[6:]} on "
        f"{model.device}, {model.config.num_labels} labels; a batch of {shapes}."
    )


def summary(result: ModelCheck, mixing: str, dtype: torch.dtype) -> list[str]:
    """Report whether the method trains the model, and what it requires of the model."""
    problem = result.problems[mixing]
    verdict = f"{mixing} does not train this model: {problem}" if problem else f"{mixing} trains this model."
    return [verdict, "", *_plan_lines(result, dtype), _mixing_line(result, dtype), *_number_lines(result, mixing)]


def _plan_lines(result: ModelCheck, dtype: torch.dtype) -> list[str]:
    from ..locations.tolerance import within_rounding

    plan = result.plan
    if plan is None:
        return [f"Locations: none. {result.reason}"]
    head = " → ".join(plan.chain) or "a layer that scores every token"
    equal = "equal" if within_rounding(result.pooled_error, dtype) else "do NOT equal"
    source = f" (from {plan.attention}, {plan.attention_base})" if result.attention == "cls" else ""
    return [
        f"Locations: up to {result.locations} per example, at the {plan.side} of {plan.source}.",
        f"Head: reads {plan.pool}, then {head}. On another batch, the logits computed from the locations {equal} the "
        f"model's own (relative error {result.pooled_error:.1e}).",
        f"Attention: auto selects {result.attention!r}, {ATTENTION[str(result.attention)]}{source}.",
    ]


def _mixing_line(result: ModelCheck, dtype: torch.dtype) -> str:
    from ..evaluation.model_check import NUM_MIXED
    from ..locations.tolerance import within_rounding

    if result.mixed_error is None:
        return "Mixing: the head is not linear, so mixing features does not equal mixing logits."
    equal = "equal" if within_rounding(result.mixed_error, dtype) else "do NOT equal"
    return (
        f"Mixing: the logits of {NUM_MIXED:,} mixed features {equal} the mixed logits "
        f"(relative error {result.mixed_error:.1e})."
    )


def _number_lines(result: ModelCheck, mixing: str) -> list[str]:
    number, share = result.num_mixed.get(mixing), result.mixing_share.get(mixing)
    if number is None:
        return []
    price = "" if share is None else f", an expected {share:.1%} of the operations of a training step"
    return [f"Mixed examples: for this batch, num_mixed='auto' selects {number:,} per step{price}."]


def cost_table(result: ModelCheck) -> list[str]:
    """Format a table of the methods: whether each trains the model, and the time of a step."""
    from ..methods import ERM

    width = max(map(len, result.problems))
    lines = [f"{'method':<{width}}  trains  forward and backward pass (plain training = 1)"]
    for name, problem in result.problems.items():
        time = f"{result.cost[name]:.2f}" if name in result.cost else "1" if name == ERM.name else ""
        lines.append(f"{name:<{width}}  {'no' if problem else 'yes':<6}  {problem or time}".rstrip())
    return lines
