"""Runs of `examples/run_image_classification_no_trainer.py` in this process, one after another."""

from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from tests.helpers.scripts import run_script

TINY = (
    "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,num_channels=1,image_size=8,"
    "patch_size=2,hidden_dropout_prob=0.1"
)
# 100 examples in mini-batches of 16, the last one of 4; two mini-batches per update.
OPTIONS = {
    "dataset_name": "digits",
    "max_train_samples": 100,
    "max_eval_samples": 45,
    "config_overrides": TINY,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 0.001,
    "num_train_epochs": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "num_warmup_steps": 2,
    "num_mixed": 50,
}


def run(output_dir, *flags, **options):
    """Run the script and return the weights that it saves, by name."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {**OPTIONS, "output_dir": output_dir, **options}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    run_script("run_image_classification_no_trainer", *given, *flags)
    return load_file(f"{output_dir}/model.safetensors")
