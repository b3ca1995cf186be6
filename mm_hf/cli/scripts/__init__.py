"""Options, data, models, and training shared by the example scripts, which run from any directory."""

from .._options import check_output_dir, quiet
from .options import DataArguments, ModelArguments, ScriptArguments, parse_arguments, reports_errors
from .training import (
    card_arguments,
    check_columns,
    image_size,
    load_from_hub,
    load_model,
    set_up,
    train_and_evaluate,
    train_and_validation,
)
