"""Tiny random models of a few architectures, and batches for them."""

import torch
import transformers
from transformers import AutoConfig

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 32, "patch_size": 8, "num_labels": 5}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT |= {"vocab_size": 99, "max_position_embeddings": 64, "num_labels": 5}

IMAGE_MODELS = {
    "vit": VISION,
    "deit": VISION,
    "dinov2": {**VISION, "mlp_ratio": 2},
    "beit": {**VISION, "use_mean_pooling": True, "use_relative_position_bias": True},
    "beit-cls": {**VISION, "use_mean_pooling": False, "use_absolute_position_embeddings": True},
}
TEXT_MODELS = {
    "bert": TEXT,
    "roberta": {**TEXT, "pad_token_id": 1},
    "distilbert": {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "num_labels": 5},
}
CLASSES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "beit": "BeitForImageClassification",
    "beit-cls": "BeitForImageClassification",
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
}
MODELS = {**IMAGE_MODELS, **TEXT_MODELS}


def build(name, seed=0, scale=True, **changes):
    """Build a model in evaluation mode. With `scale`, parameters that are initialized to 0 or 1 are random, too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name.removesuffix("-cls"), **{**MODELS[name], **changes})
    model = getattr(transformers, CLASSES[name])(config)
    if scale:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batch(name, b=6, seed=1, side=32, length=12, padding="right"):
    """Generate images of noise, or padded sequences that begin with <s> (id 2) and end with </s> (id 3)."""
    generator = torch.Generator().manual_seed(seed)
    if name in IMAGE_MODELS:
        height, width = side if isinstance(side, tuple) else (side, side)
        return {"pixel_values": torch.randn(b, 3, height, width, generator=generator)}
    pad = 1 if name == "roberta" else 0
    ids = torch.randint(10, 99, (b, length), generator=generator)
    lengths = torch.randint(5, length + 1, (b,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    ids[:, 0] = 2
    ids[torch.arange(b), lengths - 1] = 3
    ids[~mask] = pad
    if padding == "left":
        ids, mask = (
            torch.stack([row.roll(length - int(n)) for row, n in zip(x, lengths, strict=True)]) for x in (ids, mask)
        )
    return {"input_ids": ids, "attention_mask": mask.long()}


def labels(b=6, c=5, seed=2):
    return torch.randint(c, (b,), generator=torch.Generator().manual_seed(seed))
