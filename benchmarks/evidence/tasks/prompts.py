"""Spoken prompts, and a spectrogram transformer trained from scratch."""

from __future__ import annotations

from transformers import ASTConfig, ASTForAudioClassification

from benchmarks.evidence.data import prompts as data
from benchmarks.evidence.registry import TaskOptions, benchmark_task
from benchmarks.evidence.tasks.models import class_mappings
from mm_hf.comparison import Task


def prompts(options: TaskOptions, name: str, test: str) -> Task:
    """Build a task of spoken prompts that is evaluated on the given split."""
    splits = data.prompts()
    config = ASTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_mel_bins=data.MEL_BINS,
        max_length=data.FRAMES,
        frequency_stride=16,
        time_stride=16,
        initializer_range=0.1,
        **class_mappings(data.LANGUAGES),
    )
    return Task(
        name,
        lambda: ASTForAudioClassification(config),
        train_dataset=splits["training"],
        validation_dataset=splits["validation"],
        test_dataset=splits["search" if options.search else test],
        class_names=list(data.LANGUAGES),
        training_args=options.training(10, 1e-3, batch_size=32),
        settings={"data": "spoken prompts, split by prompt with seed 0", "split": test},
    )


@benchmark_task(
    "spoken prompts, a small spectrogram transformer",
    """Language (English, Spanish, French, Italian or Russian) of the spoken prompts of a telephone exchange, from
    Debian packages; the first 2.56 seconds as spectrograms. No prompt of the training split is in another split. A
    spectrogram transformer of 0.1 million parameters from scratch, 10 epochs. CutMix and TransMix are left out, since
    they are for images. No unknown classes, no robustness.""",
    without=["transmix"],
)
def prompts_ast(options: TaskOptions) -> Task:
    """Build the task of spoken prompts in voices that training has heard."""
    return prompts(options, "prompts_ast", "test")


@benchmark_task(
    "spoken prompts in an unheard voice, a small spectrogram transformer",
    """As prompts_ast, tested on an Italian voice that training has not heard: a shifted test set of a single class.""",
    without=["transmix"],
)
def prompts_other_voice(options: TaskOptions) -> Task:
    """Build the task of spoken prompts in an unheard voice."""
    return prompts(options, "prompts_other_voice", "other_voice")
