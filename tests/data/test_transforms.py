"""Evaluation pixels against PIL by hand and against torchvision."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from common.config import TrainConfig
from common.data import augment, transforms
from common.device.device import Device
from common.evaluation.torch_classifier import Normalizer
from inception_v3.spec import SPEC


def photograph(width, height):
    rng = np.random.default_rng(width * 1000 + height)
    small = Image.fromarray(rng.integers(0, 256, (12, 17, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_resize_342_crop_299_by_hand():
    image = photograph(500, 375)
    resized = image.resize((456, 342), Image.Resampling.BILINEAR)  # int(342 * 500 / 375) = 456
    # borders (456 - 299) / 2 = 78.5 and (342 - 299) / 2 = 21.5 round half to even: 78 and 22
    expected = np.asarray(resized)[22 : 22 + 299, 78 : 78 + 299]
    assert np.array_equal(transforms.eval_transform(SPEC)(image), expected)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (342, 342), (300, 800), (1031, 342), (640, 427)])
def test_pixels_are_torchvisions(size):
    image = photograph(*size)
    expected = v2.Compose([v2.Resize(342), v2.CenterCrop(299)])(image)
    assert np.array_equal(transforms.eval_transform(SPEC)(image), np.asarray(expected))


def test_the_two_passes_of_a_resize_leave_out_what_the_crop_does_not_need(monkeypatch):
    """Of every shape the pixels of one call of PIL; for all but tall images, in two calls."""
    rng, calls, resize = np.random.default_rng(0), [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *words: calls.append(words) or resize(*words))
    for i in range(400):
        width = int(rng.integers(8, 200))
        height = int(rng.integers(8, 200)) if i % 2 else int(width * rng.uniform(1.6, 2.2))
        short = min(width, height) + int(rng.integers(-3, 4)) if i % 3 else int(rng.integers(8, 100))
        crop, rounding = int(rng.integers(1, short + 1)), ("round", "floor")[i % 2]
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for resample in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
            calls.clear()
            found = transforms.eval_crop(image, short, crop, rounding, resample)
            is_split = len(calls) == 2
            splits = transforms._KNOWS_PASSES and height <= 1.8 * width and short != min(width, height)
            assert is_split == splits
            expected = transforms.center_crop(transforms.resize_short_side(image, short, resample), crop, rounding)
            assert found.tobytes() == expected.tobytes(), (width, height, short, crop)


def test_floor_rounding_cuts_one_pixel_earlier():
    assert transforms.center_crop_offset(342, 299, "round") == 22
    assert transforms.center_crop_offset(342, 299, "floor") == 21
    floor = dataclasses.replace(SPEC, crop_rounding="floor")
    image = photograph(342, 342)
    assert np.array_equal(transforms.eval_transform(floor)(image), np.asarray(image)[21:320, 21:320])


def test_the_resize_scales_with_the_image_size():
    assert SPEC.resize_for(299) == 342
    assert SPEC.resize_for(160) == 183  # 342 * 160 / 299 = 183.01
    assert transforms.eval_transform(SPEC, 160)(photograph(500, 375)).shape == (160, 160, 3)


def test_normalization_on_the_device_is_to_tensor_and_normalize_bit_for_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    classic = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(SPEC.mean, SPEC.std)]
    )
    expected = torch.stack([classic(image) for image in pixels])
    for layout in ("nchw", "channels_last"):
        assert torch.equal(Normalizer(SPEC, Device("cpu"), layout)(torch.from_numpy(pixels)), expected)


def test_the_table_of_normalized_levels_is_the_normalization_bit_for_bit():
    levels, planes = np.arange(256, dtype=np.uint8).reshape(16, 16), np.empty((3, 16, 16), np.float32)
    for values in np.random.default_rng(0).uniform(0.05, 1, (50, 2, 3)):
        transforms.normalize_into(planes, np.stack([levels] * 3, 2), *values)
        for plane, mean, std in zip(planes, *values, strict=True):
            assert transforms.normalized_levels(mean, std) == plane.ravel().tolist()


def test_training_pixels_depend_on_torchs_generator_alone():
    transform = augment.TrainTransform(
        dataclasses.replace(
            TrainConfig(), image_size=64, auto_augment="randaugment", random_erasing=0.5, color_jitter=0.4
        )
    )
    image, seen = photograph(200, 150), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        seen.append(transform.from_image(image))
    assert np.array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[0], seen[1])
    assert seen[0].shape == (64, 64, 3) and seen[0].dtype == np.uint8


def test_a_center_crop_in_training_is_the_evaluations_or_its_mirror_image():
    transform = augment.TrainTransform(dataclasses.replace(TrainConfig(), train_crop="center", image_size=64), SPEC)
    image, expected, seen = photograph(200, 150), transforms.eval_transform(SPEC, 64)(photograph(200, 150)), set()
    for seed in range(8):
        torch.manual_seed(seed)
        pixels = transform.from_image(image)
        seen.add(
            next(name for name, step in (("same", 1), ("mirror", -1)) if np.array_equal(pixels, expected[:, ::step]))
        )
    assert seen == {"same", "mirror"}
