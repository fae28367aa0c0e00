"""Data of Xception: random crop to 299, flip and color jitter 0.4 for training; 320 -> 299 for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.data import exclude, index
from common.errors import UserError
from xception.src.config import GPU, SPEC, XceptionConfig

if TYPE_CHECKING:
    from common.data.loader import EvalLoader, TrainLoader


def load_splits(config: XceptionConfig) -> index.Splits:
    """Images of --dataset_path and, where it is given, of --eval_path; both are folders of class folders."""
    excluded = exclude.read(config.exclude)
    train = index.load_folder(config.data, "--dataset-path")
    if set(train.classes) <= {"train", "val", "test"}:
        raise UserError(f"--dataset-path: {config.data} holds {', '.join(train.classes)}; give {config.data}/train")
    if not config.eval_path:
        return index.Splits(train, None).without(excluded, is_dataset_root=True)
    val = index.load_folder(config.eval_path, "--eval-path")
    val = index.in_classes(val, train.classes, "--eval-path", config.eval_path, config.data)
    return index.Splits(train, val).without(excluded, is_dataset_root=True)


def create_dataset(
    dataset_path: str,
    do_train: bool,
    batch_size: int = 64,
    device_num: int = 1,
    rank: int = 0,
    workers: int = 8,
    seed: int = GPU.seed,
) -> TrainLoader | EvalLoader:
    """The images of one rank, in an order and with augmentations that are functions of `seed`.

    Args:
      dataset_path: folder of class folders.
      do_train: augmented batches of a fixed size; else every image once, resized and cropped as published.
      device_num, rank: number of ranks, and this rank's number.
    Returns:
      for training a loader whose `epoch(n)` iterates over epoch n, else an iterable; both of common.data.loader.Batch,
      uint8 [N, 299, 299, 3]. Normalizer in common/evaluation makes (x - 127.5) / 127.5 of them on the device.
    """
    from common.data import augment, loader, sampling, transforms

    images = index.load_folder(dataset_path, "--dataset-path")
    if not do_train:
        crop = transforms.eval_transform(SPEC)
        return loader.EvalLoader(images, crop, batch_size, "fail", rank, device_num, workers, False)
    plan, transform = sampling.StepPlan(len(images), device_num, batch_size), augment.TrainTransform(GPU)
    return loader.TrainLoader(images, transform, plan, seed, GPU.on_bad_image, rank, device_num, workers, False)
