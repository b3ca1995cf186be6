"""Trainers on digits that push to the Hub, and the tokens of the users."""

import numpy as np
from transformers import ViTImageProcessorPil

from mm_hf import DenseMultiMix, MultiMixTrainer
from tests.helpers import digits

ANN, READER, BOB = "hf_annsOwnSecret", "hf_annsReader", "hf_bobsOwn"
DENSE = DenseMultiMix(num_mixed=20)
TOKENS = {ANN: ("ann", "write"), READER: ("ann", "read"), BOB: ("bob", "write")}


def trainer_of(directory, mixing=DENSE, rgb=False, **args):
    channels = 3 if rgb else 1
    data = digits.dataset()
    if rgb:
        data = data.with_format(None).map(lambda row: {"pixel_values": np.repeat(row["pixel_values"], 3, 0)})
        data = data.with_format("torch")
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.5] * channels, do_convert_rgb=rgb
    )
    settings = {"max_steps": 2, "hub_token": ANN, "eval_strategy": "steps", "eval_steps": 1, **args}
    return MultiMixTrainer(
        digits.vit(num_channels=channels),
        digits.arguments(directory / "digits", **settings),
        mixing=mixing,
        train_dataset=data,
        eval_dataset=data.select(range(40)),
        processing_class=processor,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def train(directory, *args, **settings):
    trainer = trainer_of(directory, *args, **settings)
    trainer.train()
    return trainer
