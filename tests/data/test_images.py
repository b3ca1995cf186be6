"""One pixel path: training images are preprocessed exactly as evaluation images."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from mm_hf import probe
from mm_hf.data.dummy_inputs import example_batch
from mm_hf.data.images import BATCH_PIXELS, ImageDataset, ImageTransform, convert_image, read_image_row
from mm_hf.evaluation.metrics import Normalization
from tests.helpers import zoo

FLAT = Image.fromarray(np.full((64, 80, 3), (200, 100, 50), np.uint8))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
SQUARE = {"height": 32, "width": 32}


def pixels(processor, image, augmentation, train):
    transform = ImageTransform(processor, augmentation=augmentation, train=train)
    return torch.as_tensor(transform({"image": [image], "label": [0]})["pixel_values"][0])


def check_pixels(processor):
    evaluated = pixels(processor, FLAT, "none", False)
    assert torch.equal(evaluated, pixels(processor, FLAT, "crop_flip", True))
    assert torch.equal(pixels(processor, NOISE, "none", False), pixels(processor, NOISE, "none", True))


@pytest.mark.parametrize(
    "processor",
    [
        MobileViTImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
        EfficientNetImageProcessorPil(size=SQUARE),
        ViTImageProcessorPil(size=SQUARE, do_normalize=False),
        ViTImageProcessorPil(do_resize=False),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_flat_image_has_equal_pixels_in_training_and_evaluation(processor):
    check_pixels(processor)


def processor_names():
    found = set()
    for names in IMAGE_PROCESSOR_MAPPING_NAMES.values():
        values = names.values() if isinstance(names, dict) else names if isinstance(names, (tuple, list)) else [names]
        found |= {name for name in values if name}
    return sorted(found)


@pytest.mark.zoo
@pytest.mark.vision
@pytest.mark.parametrize("name", processor_names())
def test_every_processor_has_equal_pixels_in_training_and_evaluation(name):
    settings = {"pretrained_cfg": {"input_size": (3, 32, 32)}} if name == "TimmWrapperImageProcessor" else {}
    try:
        processor = getattr(transformers, name)(**settings)
    except ImportError:
        pytest.skip("requires torchvision or timm")
    try:
        pixels(processor, FLAT, "none", False)
    except (ImportError, IndexError, KeyError, TypeError, ValueError):
        pytest.skip("takes more than images, or returns no pixel_values per image")
    check_pixels(processor)


def albumentation(image):
    albumentations = pytest.importorskip("albumentations")
    return albumentations.HorizontalFlip(p=1)(image=np.array(image))["image"]


def torchvision_transform(image):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    return v2.RandomHorizontalFlip(p=1)(image)


def torchvision_transform_of_tensors(image):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    return v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(p=1)])(image)


def kornia_transform(image):
    kornia = pytest.importorskip("kornia")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    flipped = kornia.augmentation.RandomHorizontalFlip(p=1.0)(pixels)[0]
    return (255 * flipped).round().to(torch.uint8)


@pytest.mark.vision
@pytest.mark.parametrize(
    "augmentation", [albumentation, torchvision_transform, torchvision_transform_of_tensors, kornia_transform]
)
def test_transforms_of_other_libraries_are_applied(augmentation):
    processor = ViTImageProcessorPil(size=SQUARE)
    flipped = pixels(processor, NOISE.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "none", False)
    assert torch.equal(pixels(processor, NOISE, augmentation, True), flipped)


@pytest.mark.parametrize("result", [None, np.zeros((4, 4, 3)), torch.zeros(3, 4, 4)])
def test_augmentation_that_returns_no_8_bit_image_is_rejected(result):
    with pytest.raises(TypeError, match="augmentation must return a PIL image, or an array or a tensor of 8-bit"):
        pixels(ViTImageProcessorPil(size=SQUARE), NOISE, lambda image: result, True)


def test_masks_and_shapes_of_the_processor_are_kept():
    model = zoo.build("Siglip2ForImageClassification")
    processor = transformers.Siglip2ImageProcessorPil(
        patch_size=model.config.vision_config.patch_size, max_num_patches=16
    )
    batch = example_batch(model, processor, "image", 3)
    assert set(batch) == {"pixel_values", "pixel_attention_mask", "spatial_shapes", "labels"}
    assert model(**batch).logits.shape == (3, 5)
    assert probe(model, batch).pool == "mean[mask]"
    with pytest.raises(ValueError, match="returns no images but patches or colors"):
        Normalization.of(processor)


@pytest.mark.parametrize("augmentation", ["crop", "crop_flip", "randaugment"])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_keeps_size_and_changes_pixels(augmentation, channels):
    mode = "RGB" if channels == 3 else "L"
    processor = ViTImageProcessorPil(size=SQUARE, image_mean=[0.5] * channels, image_std=[0.5] * channels)
    processor.do_convert_rgb = channels == 3
    transform = ImageTransform(processor, augmentation=augmentation, num_channels=channels, train=True)
    torch.manual_seed(0)
    images = [NOISE.convert(mode), FLAT.convert(mode)] * 4
    result = transform({"image": images, "label": [0] * 8})["pixel_values"]
    assert all(x.shape == (channels, 32, 32) for x in map(torch.as_tensor, result))
    assert not torch.equal(torch.as_tensor(result[0]), torch.as_tensor(result[2]))
    assert transform.augment(images[0]).size == images[0].size


def test_own_transform_is_applied_to_the_image_in_training_only():
    processor = ViTImageProcessorPil(size=SQUARE)
    black = pixels(processor, Image.new("RGB", (8, 8)), "none", False)
    assert torch.equal(pixels(processor, FLAT, lambda image: Image.new("RGB", image.size), True), black)
    assert not torch.equal(pixels(processor, FLAT, lambda image: Image.new("RGB", image.size), False), black)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_images_of_8_bits_are_converted_as_pil_does(mode):
    image = NOISE.convert(mode)
    expected = image.convert("RGB")
    assert np.array_equal(np.asarray(convert_image(image, "RGB")), np.asarray(expected))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_images_of_16_bits_are_scaled(dtype):
    values = np.array([[0, 257, 257 * 100], [257 * 200, 257 * 255, 128]], dtype=dtype)
    assert np.asarray(convert_image(Image.fromarray(values), "L")).tolist() == [[0, 1, 100], [200, 255, 0]]


@pytest.mark.parametrize("values", [np.full((2, 2), 0.5, np.float32), np.full((2, 2), 70_000, np.int32)])
def test_images_without_a_defined_range_are_rejected(values):
    transform = ImageTransform(ViTImageProcessorPil(size=SQUARE))
    with pytest.raises(ValueError, match="Image 0 of the batch cannot be used: the image has .* convert it to 8 or 16"):
        transform({"image": [Image.fromarray(values)], "label": [0]})


def image_rows(paths):
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in paths], "label": [0] * len(paths)})
    return rows.cast_column("image", datasets.Image())


def truncated(path):
    NOISE.save(path)
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "write", [truncated, lambda path: path.write_text("not an image"), lambda path: path.write_bytes(b"")]
)
def test_unreadable_image_is_named(tmp_path, write):
    FLAT.save(tmp_path / "fine.png")
    write(tmp_path / "broken.png")
    rows = image_rows([tmp_path / "fine.png", tmp_path / "broken.png"])
    with pytest.raises(ValueError, match=r"The image .*broken\.png cannot be read \(.*\): replace it or remove it"):
        ImageDataset(rows, ImageTransform(ViTImageProcessorPil(size=SQUARE)))


def test_decompression_bomb_is_rejected_by_name(tmp_path, monkeypatch):
    NOISE.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match=r"large\.png cannot be read \(Image size .* exceeds limit"):
        read_image_row(image_rows([tmp_path / "large.png"]), 0, "image")


def test_orientation_of_exif_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    NOISE.save(tmp_path / "turned.jpg", exif=exif)
    row = read_image_row(image_rows([tmp_path / "turned.jpg"]), 0, "image")
    assert row["image"].size == NOISE.size[::-1]


def test_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (200, 100)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    row = read_image_row(image_rows([tmp_path / "animated.gif"]), 0, "image")
    assert convert_image(row["image"], "RGB").getpixel((0, 0)) == (200, 0, 0)


def test_decoded_pixels_in_memory_are_limited(tmp_path, monkeypatch):
    Image.new("RGB", (400, 300)).save(tmp_path / "photograph.png")
    transform = ImageTransform(ViTImageProcessorPil(size=SQUARE))
    sizes = []

    def processor(images, **settings):
        sizes.append(len(images))
        return {"pixel_values": torch.zeros(len(images), 3, 2, 2)}

    transform.processor = processor
    monkeypatch.setattr("mm_hf.data.images.BATCH_PIXELS", 500_000)
    assert len(ImageDataset(image_rows([tmp_path / "photograph.png"] * 13), transform)) == 13
    assert sizes == [1, 5, 5, 3] and BATCH_PIXELS < 2**25


def test_augmentation_depends_on_seed_epoch_and_indices_only(tmp_path):
    NOISE.save(tmp_path / "noise.png")
    rows = image_rows([tmp_path / "noise.png"] * 4)
    data = ImageDataset(rows, ImageTransform(ViTImageProcessorPil(size=SQUARE), augmentation="crop", train=True))
    first = [row["pixel_values"] for row in data.__getitems__([0, 1])]
    torch.rand(3)
    again = [row["pixel_values"] for row in data.__getitems__([0, 1])]
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], first[1])
    data.seed_augmentation(0, 1)
    assert not torch.equal(data.__getitems__([0, 1])[0]["pixel_values"], first[0])
