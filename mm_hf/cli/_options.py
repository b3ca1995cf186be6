"""Options of commands: dataclasses and the fields of TrainingArguments.

The module imports neither torch nor Transformers, so that an invalid command line is reported at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import importlib.util
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..methods.settings import Setting, read_classes, read_settings, setting, settings_of

TRAINING = "training: fields of TrainingArguments, such as --num_train_epochs 20 --learning_rate 1e-3 --bf16"
SMALL_VIT = """--model_type vit --config_overrides \\
  hidden_size=48,num_hidden_layers=4,intermediate_size=96,image_size=8,patch_size=2,num_channels=1"""
# Options that --help omits and --help-all includes.
ADVANCED_OPTIONS = frozenset(
    (
        *("dataset_config_name", "validation_dir", "test_dir", "max_length", "ood_dataset_name", "ood_classes"),
        *("attention_map_steps", "test_split", "allow_changed_settings", "check_data"),
        *("image_column_name", "text_column_names", "label_column_name"),
        *("max_train_samples", "max_validation_samples", "max_test_samples"),
        *("tokenizer_name", "image_processor_name", "ignore_mismatched_sizes", "model_revision", "cache_dir", "token"),
        *("robustness_samples", "epsilon"),
        *("examples_per_mix", "detach_attention", "confidence_weighted", "gather_across_devices"),
        *("kernel", "input_mixing_prob", "input_mixing", "input_mixing_start", "min_fit"),
        *("clean_weight", "pooled_weight", "dense_weight", "class_weights", "train_val_split"),
        # of the example scripts
        *("max_eval_samples", "max_predict_samples", "pad_to_max_length", "padding_side", "do_regression"),
        *("label_all_tokens", "return_entity_level_metrics", "id2label", "do_reduce_labels", "eval_split_name"),
        *("feature_extractor_name", "feature_extractor_overrides", "freeze_feature_encoder", "attention_mask"),
        *("audio_column_name", "text_column_name", "lora_dropout", "lora_alpha", "lora_target_modules", "merge_lora"),
        *("with_tracking", "report_to", "hub_model_id", "hub_token", "dataloader_num_workers", "weight_decay"),
        *("lr_scheduler_type", "num_warmup_steps", "max_train_steps", "gradient_accumulation_steps", "seed"),
        *("per_device_eval_batch_size",),
    )
)
# Fields of TrainingArguments that a comparison sets itself (`comparison.task.FIXED_ARGUMENTS`), with the remedy.
FIXED_OPTIONS = dict.fromkeys(
    (
        *("output_dir", "seed", "data_seed", "do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
        *("push_to_hub", "hub_model_id", "hub_token", "full_determinism"),
    ),
    "remove it",
)
# Short names of fields of TrainingArguments in other training programs.
SHORT_NAMES = {
    "learning_rate": "--lr",
    "per_device_train_batch_size": "--batch_size",
    "num_train_epochs": "--epochs",
}


@dataclass
class RobustnessOptions:
    """Evaluation of robustness."""

    robustness_samples: int = setting(500, "Number of test images to attack and corrupt; 0 to skip.", within="[0, inf)")
    epsilon: float = setting(8 / 255, "Maximum FGSM perturbation of pixels in [0, 1]. Default: 8/255.", within="[0, 1]")


class CompactHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help with one spelling of each option, a short metavar, and the default value."""

    COLUMN = 32  # of the help texts

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=self.COLUMN, width=min(shutil.get_terminal_size().columns, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return action.option_strings[-1] if action.option_strings else super()._format_action_invocation(action)
        one: Setting = action.setting  # type: ignore[attr-defined]
        several = " ..." if action.nargs in ("+", "*") else ""
        kind = "X" if "str" in one.types or not one.types else "N"
        if one.choices and self._fits_with_choices(action.option_strings[0], one.choices):
            kind = "|".join(map(str, one.choices))
        return f"{action.option_strings[0]} {'[yes|no]' if one.is_flag else f'{kind}{several}'}"

    def _fits_with_choices(self, name: str, choices: Sequence[Any]) -> bool:
        """Return True if the choices of an option fit between its name and its help text."""
        return len(f"  {name} {'|'.join(map(str, choices))}  ") <= self.COLUMN

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        choices = action.setting.choices if hasattr(action, "setting") else ()
        if choices and not self._fits_with_choices(action.option_strings[0], choices):
            first, end, rest = text.partition(".")
            text = f"{first}: {', '.join(map(str, choices))}{end}{rest}"
        default = action.setting.default if hasattr(action, "setting") else None
        if default in (None, argparse.SUPPRESS, "", False) or "efault" in text or not action.option_strings:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{text} [{shown}]".replace("%", "%%") if "%%" not in text else f"{text} [{shown}]"


class ShortHelpFormatter(CompactHelpFormatter):
    """Help with the first sentences on each option, as many as fit a line, and its default value."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        sentences = re.split(r"(?<=\.) ", text)
        while len(sentences) > 1 and len(" ".join(sentences)) > width:
            sentences.pop(-2 if sentences[-1].startswith("[") and len(sentences) > 2 else -1)
        return super()._split_lines(" ".join(sentences), width)


class CommandParser(argparse.ArgumentParser):
    """Parser that raises ValueError for invalid command lines and has a short and a complete help text.

    Attributes:
        trains: True if the fields of TrainingArguments are options, too.
        more: The options that the short help omits, as the end of a sentence.
    """

    trains = False
    more = ""

    def error(self, message: str) -> Any:
        """Raise a ValueError for an invalid command line."""
        message = re.sub(r"^argument (--\w+)[^:]*: ", r"\1 ", message)
        raise ValueError(message if message.endswith(".") else f"{message}. --help lists the options.")

    def format_help(self) -> str:
        """Return the help text without the advanced options, which fits one screen."""
        hidden, complete = {}, self.formatter_class
        for action in self._actions:
            # The help shows a flag as --NAME [yes|no], without --no_NAME.
            advanced = action.dest in ADVANCED_OPTIONS or action.option_strings[:1] == [f"--no_{action.dest}"]
            if advanced or action.dest in ("help", argparse.SUPPRESS):
                hidden[action], action.help = action.help, argparse.SUPPRESS
        self.formatter_class = ShortHelpFormatter
        try:
            return f"{super().format_help()}--help-all shows all options{self.more}.\n"
        finally:
            self.formatter_class = complete
            for action, text in hidden.items():
                action.help = text

    def format_all(self) -> str:
        """Return the help text with all options, followed by the fields of TrainingArguments."""
        text = super().format_help()
        if not self.trains:
            return text
        formatter = self._get_formatter()
        formatter.start_section("training (fields of transformers.TrainingArguments)")
        actions = _training_parser()._actions
        formatter.add_arguments([a for a in actions if not a.option_strings[0].startswith("--no_")])
        formatter.end_section()
        return f"{text}\n{formatter.format_help()}"


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_all())
        parser.exit()


def make_parser(
    program: str, usage: str, description: str, epilog: str, *, trains: bool = True, **groups: Any
) -> CommandParser:
    """Create a parser with one group of options per dataclass.

    Args:
        program: Name of the program, such as "mm-hf train".
        usage: Usage line.
        description: Text before the options: the purpose of the command, and an example.
        epilog: Text after the options.
        trains: Accept the fields of TrainingArguments as options, too.
        groups: By the titles of the groups, dataclasses or settings by name.
    """
    parser = CommandParser(
        prog=program, usage=usage, description=description, epilog=epilog, formatter_class=CompactHelpFormatter,
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    parser.trains = trains
    own = set()
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        settings = options if isinstance(options, Mapping) else settings_of(options)
        for one in settings.values():
            _add_option(group, one)
        own |= set(settings)
    more = [f"{len(own & ADVANCED_OPTIONS)} more"] if own & ADVANCED_OPTIONS else []
    more += [f"the {len(training_settings())} fields of TrainingArguments"] if trains else []
    parser.more = f": {' and '.join(more)}" if more else ""
    shown = parser.add_argument_group("help")
    shown.add_argument("-h", "--help", action="help", help="Show the main options.")
    shown.add_argument(
        "--help-all", nargs=0, action=_HelpAll, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
        help="Show all options.",
    )  # fmt: skip
    return parser


def _add_option(group: Any, one: Setting) -> None:
    names = list(dict.fromkeys([f"--{one.name}", f"--{one.name.replace('_', '-')}"]))
    names += [SHORT_NAMES[one.name]] if one.name in SHORT_NAMES else []
    given: dict[str, Any] = {"default": argparse.SUPPRESS, "help": str(one.metadata.get("help") or "")}
    if one.is_flag:
        given |= {"nargs": "?", "const": True}
    elif one.metadata.get("nargs") or one.many:
        given |= {"nargs": one.metadata.get("nargs") or "+", "const": one.metadata.get("const")}
    action = group.add_argument(*names, type=_converter(one), action=_Store, **given)
    action.setting = one
    if one.is_flag and one.default is True:
        off = [f"--no_{one.name}", f"--no-{one.name.replace('_', '-')}"]
        group.add_argument(*off, action="store_false", dest=one.name, default=argparse.SUPPRESS)


class _Store(argparse.Action):
    """Store a value: a list of one value as this value if the setting accepts both."""

    setting: Setting

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        single = isinstance(values, list) and len(values) == 1 and self.setting.single
        setattr(namespace, self.dest, values[0] if single else values)


def _converter(one: Setting) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return one.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{str(error).removeprefix(one.name).strip()}") from None

    return convert


def parse(
    parser: CommandParser,
    arguments: Sequence[str],
    program: str,
    fixed: Mapping[str, str],
    misplaced: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Parse a command line into the values that it gives, by the name of the option.

    Args:
        parser: Parser from [`make_parser`].
        arguments: Command-line arguments after the expansion of option files.
        program: Name of the program in error messages.
        fixed: Fields of TrainingArguments that the command sets itself, with the remedy.
        misplaced: Options that belong elsewhere, with the end of the error message.

    Raises:
        ValueError: An option is unknown, or a value is invalid.
    """
    found, rest = parser.parse_known_args(list(arguments))
    for option in rest:
        if option.partition("=")[0] in misplaced:
            raise ValueError(f"{option} {misplaced[option.partition('=')[0]]}")
    training = argparse.Namespace()
    trainer = _training_parser()
    if parser.trains and rest:
        training, rest = trainer.parse_known_args(rest)
    if rest:
        raise ValueError(_unknown_option(rest[0], program, [parser, *([trainer] if parser.trains else [])]))
    for name in vars(training):
        if name in fixed:
            raise ValueError(f"--{name} is set by {program}: {fixed[name]}.")
    return {**vars(training), **vars(found)}


def take(values: Mapping[str, Any], dataclass_: Any) -> Any:
    """Return a dataclass with the values of its fields."""
    return dataclass_(**{f.name: values[f.name] for f in dataclasses.fields(dataclass_) if f.name in values})


def training_values(values: Mapping[str, Any], *taken: Any) -> dict[str, Any]:
    """Return the fields of TrainingArguments among the values, without those of the dataclasses or settings `taken`."""
    own = {name for options in taken for name in (options if isinstance(options, Mapping) else settings_of(options))}
    return {name: value for name, value in values.items() if name in training_settings() and name not in own}


def _unknown_option(option: str, program: str, parsers: Sequence[CommandParser]) -> str:
    if not option.startswith("-"):
        return f"{option!r} is not an option of {program}: options begin with --, and --help lists them."
    own = [s for p in parsers for action in p._actions for s in action.option_strings if s.startswith("--")]
    near = difflib.get_close_matches(option.partition("=")[0], own, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the options."
    fields = " or a field of TrainingArguments" if len(parsers) > 1 else ""
    return f"{option.partition('=')[0]} is not an option of {program}{fields}: {hint}"


def check_is_directory(output_dir: str | Path) -> None:
    """Raise a ValueError if the output directory is a file."""
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file: choose a directory.")


def check_output_dir(directory: Path, checkpoints: Sequence[Path]) -> None:
    """Raise a ValueError if the output directory of a new training run has checkpoints.

    Args:
        directory: The output directory.
        checkpoints: Its checkpoints, the newest first.
    """
    if checkpoints:
        raise ValueError(
            f"{directory} contains {checkpoints[0].name} of an earlier training run: resume it with "
            "--resume_from_checkpoint, or choose another --output_dir."
        )


def check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Raise a ValueError if a tracker is not installed.

    Args:
        report_to: The field of TrainingArguments.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if not set(names) - {"all", "none"}:
        return

    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for name in names:
        if name not in (*installed, "all", "none"):
            raise ValueError(
                f"--report_to {name} is not an installed tracker. Installed trackers: "
                f"{', '.join(installed) or 'none'} (pip install tensorboard or trackio)."
            )


def quiet() -> None:
    """Disable the progress bars of Transformers and Datasets."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@functools.cache
def training_settings() -> dict[str, Setting]:
    """Return the fields of TrainingArguments by name, read from its source."""
    spec = importlib.util.find_spec("transformers")
    folder = Path(str(spec and spec.origin)).parent
    classes = read_classes([folder / "training_args.py", folder / "trainer_utils.py"])
    enums = {
        name: tuple(
            part.value.value
            for part in node.body
            if isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant)
        )
        for name, node in classes.items()
        if any(isinstance(base, ast.Name) and base.id.endswith("Enum") for base in node.bases)
    }
    return read_settings("TrainingArguments", classes, enums)


@functools.cache
def _training_parser() -> Any:
    """Create a parser of the fields of TrainingArguments that returns only those that are given."""
    parser = CommandParser(allow_abbrev=False, add_help=False, formatter_class=CompactHelpFormatter)
    for one in training_settings().values():
        _add_option(parser, one)
    return parser
