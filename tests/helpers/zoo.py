"""Tiny random models of all classification classes of Transformers, and random batches for them.

Sizes are set by the names of configuration entries (`SIZES`); `zoo_overrides` has the exceptions.
"""

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from tests.helpers.zoo_overrides import OVERRIDES

MAPPINGS = {
    "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "video": modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
}
TASKS = {
    name: task
    for task, mapping in MAPPINGS.items()
    for names in mapping.values()
    for name in ([names] if isinstance(names, str) else names)
}

WORDS = range(10, 90)  # ids of words; special tokens have lower ids, placeholders of images have higher ones
SAMPLES = 100  # samples of a waveform per unit of `length`

NAMES = {
    32: "hidden_size d_model n_embd emb_dim dim embed_dim embedding_size word_embed_proj_dim output_hidden_size "
    "pooler_output_size out_hidden_size prediction_head_size input_embedding_size output_embedding_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk num_conv_pos_embedding_groups mask_time_length",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts num_frames",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner n_inner hidden_dim dff d_ff "
    "feed_forward_size ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size",
    8: "head_dim d_head d_kv attention_head_size kv_channels sliding_window local_attention patch_size "
    "num_conv_pos_embeddings",
    16: "classifier_proj_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
    99: "vocab_size",
    98: "image_token_id image_token_index",
    97: "boi_token_index vision_start_token_id",
    96: "eoi_token_index vision_end_token_id",
    95: "video_token_id",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}
SIZES |= {"image_size": 32, "input_size": 32}
SIZES |= {"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4]}
REQUIRED = ("head_dim", "num_key_value_heads", "vocab_size")  # set even if the default is None


class Unavailable(Exception):  # noqa: N818
    """The class cannot be built in this environment; the message names what is missing."""


def class_names():
    return sorted(TASKS)


def build(name, *, seed=0, num_labels=5, **config_changes):
    """Build a model in evaluation mode with the default attention and all parameters random.

    `config_changes` are entries of the configuration; a dictionary for a sub-configuration changes only its entries.
    """
    try:
        cls = getattr(transformers, name)
        default = cls.config_class().to_dict()
        changes = shrink(default, special_ids(default))
        changes = merge(changes, OVERRIDES.get(cls.config_class.model_type, {}), config_changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(cls.config_class(**changes, num_labels=num_labels)).eval()
            randomize(model)
            settle(name, model)
    except ImportError as error:
        raise Unavailable(str(error).strip().split(". ")[0]) from error
    return model


@torch.no_grad()
def randomize(model):
    """Add noise to all parameters.

    Parameters that are initialized to 0 or 1 make tokens equal, or modules the identity, and would hide errors.
    """
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))


def settle(name, model):
    settle_norms(model, batch(name, model, b=8))


@torch.no_grad()
def settle_norms(model, inputs):
    """Set the running statistics of batch norms to those of a batch, as after training.

    Without them, the activations of twenty random convolutions overflow or vanish.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def shrink(config, ids):
    """Return the entries to change in a configuration (as a dictionary) and its sub-configurations."""
    changes = {}
    for key, value in config.items():
        if key in ids:
            changes[key] = ids[key]
        elif isinstance(value, dict) and "model_type" in value:
            changes[key] = {"model_type": value["model_type"], **shrink(value, ids)}
        elif key in SIZES and (isinstance(value, int | list) or key in REQUIRED):
            changes[key] = SIZES[key]
        elif key in ("layer_types", "layers_block_type"):  # one layer of each kind, at least two layers
            kinds = list(dict.fromkeys(value))
            changes[key] = kinds if len(kinds) > 1 else kinds * 2
    return changes


def merge(*parts):
    """Merge nested dictionaries; later ones take precedence."""
    merged = {}
    for part in parts:
        for key, value in part.items():
            nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if nested else value
    return merged


def special_ids(config):
    """Return distinct ids below 10 of the special tokens: the defaults if they are valid, else free ones."""
    parts = [config]
    for part in parts:  # the list grows during the loop
        parts += [value for value in part.values() if isinstance(value, dict) and "model_type" in value]
    below, ids = range(WORDS[0]), {}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        default = next((part[key] for part in parts if part.get(key) is not None), None)
        if default in below and default not in ids.values():
            ids[key] = default
    free = (number for number in below if number not in list(ids.values()))
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids.setdefault(key, next(free))
    return {**ids, "cls_token_id": ids["bos_token_id"], "sep_token_id": ids["eos_token_id"], "mask_token_id": 9}


def batch(name, model, *, b=4, seed=1, length=12, padding="right"):
    """Generate keyword arguments of the model's forward, without labels.

    `length` is the number of tokens of a text or, for audio, of units of 100 samples or of frames. Images and videos
    have the configuration's size. The lengths of texts and waveforms differ unless `padding` is None.
    """
    generator = torch.Generator().manual_seed(seed)
    make = MAKERS.get(model.config.model_type, MAKERS[TASKS[name]])
    return make(model, b, length, padding, generator)


def find(config, key):
    """Return the first entry of this name that is not None, in a configuration or its sub-configurations."""
    value = getattr(config, key, None)
    for part in config.sub_configs:
        value = find(getattr(config, part), key) if value is None else value
    return value


def text(model, b, length, padding, generator):
    """Generate rows of words between a begin token and an end token, if the configuration has these."""
    config = model.config
    ids = torch.randint(WORDS[0], WORDS[-1] + 1, (b, length), generator=generator)
    lengths = row_lengths(b, length, padding, generator)
    mask = torch.arange(length) < lengths[:, None]
    bos, eos = find(config, "bos_token_id"), find(config, "eos_token_id")
    if bos is not None:
        ids[:, 0] = bos
    if eos is not None:
        ids[torch.arange(b), lengths - 1] = eos
    ids[~mask] = find(config, "pad_token_id") or 0
    if padding == "left":
        ids, mask = (
            torch.stack([row.roll(length - int(n)) for row, n in zip(x, lengths, strict=True)]) for x in (ids, mask)
        )
    return {"input_ids": ids, "attention_mask": mask.long()}


def row_lengths(b, length, padding, generator):
    """Return lengths from half of `length` (at least 6, which all makers need) to `length`, in random order."""
    lengths = torch.linspace(length, max(length // 2, min(length, 6)), b).long()[torch.randperm(b, generator=generator)]
    return lengths if padding else torch.full((b,), length)


def layout(model, *args):
    """Generate a text whose tokens have boxes (left, top, right, bottom)."""
    inputs = text(model, *args)
    corners = torch.randint(0, 500, (2, *inputs["input_ids"].shape, 2), generator=args[-1])
    return {**inputs, "bbox": torch.cat([corners[0], corners.sum(dim=0)], dim=-1)}


def document(model, *args):
    """Generate text in boxes and an image of its page."""
    return {**layout(model, *args), "pixel_values": image(model, *args)["pixel_values"]}


def markup(model, *args):
    """Generate a text whose tokens have the tags on their path and the tags' positions among siblings."""
    inputs = text(model, *args)
    paths = torch.randint(0, 20, (2, *inputs["input_ids"].shape, model.config.max_depth), generator=args[-1])
    return {**inputs, "xpath_tags_seq": paths[0], "xpath_subs_seq": paths[1]}


def table(model, *args):
    """Generate a text whose tokens have a segment, a column, a row and four more properties."""
    inputs = text(model, *args)
    shape = (*inputs["input_ids"].shape, len(model.config.type_vocab_sizes))
    return {**inputs, "token_type_ids": torch.randint(0, 2, shape, generator=args[-1])}


def prompt(model, b, length, padding, generator):
    """Generate a text that begins with an image's tokens. Padding is on the left, because the last position is read."""
    tokens = model.config.mm_tokens_per_image
    inputs = text(model, b, length, "left" if padding else None, generator)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        first = int(mask.argmax()) + 1
        ids[first : first + tokens] = model.config.image_token_id
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    return {
        **inputs,
        "token_type_ids": types,
        "pixel_values": image(model, b, length, padding, generator)["pixel_values"],
    }


def image(model, b, length, padding, generator):
    return {"pixel_values": torch.randn(b, 3, *sides(model.config), generator=generator)}


def sides(config):
    size = find(config, "image_size") or find(config, "input_size") or find(config, "crop_size") or 64
    return (size, size) if isinstance(size, int) else tuple(size)


def pixels(model, b, length, padding, generator):
    """Generate color indices, which ImageGPT reads as words."""
    return {"input_ids": torch.randint(0, model.config.vocab_size - 1, (b, 16), generator=generator)}


def patches(model, b, length, padding, generator):
    """Generate flattened patches of images of different shapes, padded to the same number, for SigLIP 2."""
    vision = model.config.vision_config
    shapes = torch.tensor([[4, 4], [3, 5], [2, 6], [3, 3]])[torch.arange(b) % 4]
    mask = (torch.arange(vision.num_patches) < shapes.prod(dim=1, keepdim=True)).long()
    values = torch.randn(b, vision.num_patches, 3 * vision.patch_size**2, generator=generator)
    return {"pixel_values": values * mask[..., None], "pixel_attention_mask": mask, "spatial_shapes": shapes}


def waveform(model, b, length, padding, generator):
    lengths = row_lengths(b, SAMPLES * length, padding, generator)
    mask = torch.arange(SAMPLES * length) < lengths[:, None]
    values = torch.randn(b, SAMPLES * length, generator=generator)
    return {"input_values": values * mask, "attention_mask": mask.long()}


def frames(model, b, length, padding, generator):
    lengths = row_lengths(b, length, padding, generator)
    mask = torch.arange(length) < lengths[:, None]
    values = torch.randn(b, length, model.config.feature_projection_input_dim, generator=generator)
    return {"input_features": values * mask[..., None], "attention_mask": mask.long()}


def spectrogram(model, b, length, padding, generator):
    """Generate as many frames as the position table has; time comes first for AST and last for Whisper."""
    config = model.config
    if config.model_type == "whisper":
        shape = (b, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        shape = (b, config.max_length, config.num_mel_bins)
    return {model.main_input_name: torch.randn(shape, generator=generator)}


def video(model, b, length, padding, generator):
    config = model.config
    count = config.frames_per_clip if config.model_type == "vjepa2" else config.num_frames
    return {model.main_input_name: torch.randn(b, count, 3, *sides(config), generator=generator)}


MAKERS = {
    "text": text,
    "image": image,
    "audio": waveform,
    "video": video,
    "layoutlm": layout,
    "layoutlmv2": document,
    "layoutlmv3": document,
    "lilt": layout,
    "markuplm": markup,
    "tapas": table,
    "shieldgemma2": prompt,
    "imagegpt": pixels,
    "siglip2": patches,
    "wav2vec2-bert": frames,
    "audio-spectrogram-transformer": spectrogram,
    "whisper": spectrogram,
}
