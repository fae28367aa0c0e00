"""Training input, from JPEG files to batches, compared with ImageFolder on PIL, timm and DALI, in turns (A B A B).

    python tests/bench/bench_pipeline.py --photos FOLDER --rounds 7

Random resized crop to 299, flip; the baselines of PIL and timm's transforms as their own examples have them, with
float32 normalized batches (timm: uint8, as ours). One core: processor time of this process, pinned to a core, without
workers. Two cores: wall-clock time with two workers. The limit is the time of decoding every file alone. A row whose
peer is not installed is left out. Without --photos, images of 500 x 375 pixels are drawn.
"""

import argparse
import importlib.util
import itertools
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import bench_deploy
import numpy as np
import record
import torch
import torchvision
from PIL import Image
from torch.utils import data

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.config import TrainConfig
from common.data import augment, decode, index, jpeg, loader, sampling, transforms

SIZE, BATCH, CLASSES, IMAGES = 299, 32, 10, 640
MEAN = STD = (0.5, 0.5, 0.5)
LIMIT = "decoding alone"


class Ours:
    """The repository's loader; an epoch per call."""

    def __init__(self, root, workers, **options):
        images = index.load_folder(root)
        plan = sampling.StepPlan(len(images), 1, BATCH)
        self.images = plan.steps_per_epoch * BATCH
        transform = augment.TrainTransform(TrainConfig(**options))
        self.loader = loader.TrainLoader(images, transform, plan, 0, "fail", 0, 1, workers, False)
        self.epochs = itertools.count()

    def __call__(self):
        for batch in self.loader.epoch(next(self.epochs)):
            batch.raise_if_failed()

    def close(self):
        self.loader.close()


class Plain:
    """ImageFolder, torchvision's transforms on PIL, ToTensor, Normalize, torch's DataLoader."""

    def __init__(self, root, workers, jitter=0.0):
        t = torchvision.transforms
        steps = [t.RandomResizedCrop(SIZE), t.RandomHorizontalFlip()]
        steps += [t.ColorJitter(jitter, jitter, jitter)] if jitter else []
        steps += [t.ToTensor(), t.Normalize(MEAN, STD)]
        images = torchvision.datasets.ImageFolder(root, t.Compose(steps))
        self.images = len(images) // BATCH * BATCH
        self.loader = data.DataLoader(
            images, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
        )

    def __call__(self):
        for _ in self.loader:
            pass

    def close(self):
        del self.loader


class Timm(Plain):
    """timm's training transform and collate function: uint8 batches, as its prefetcher takes them."""

    def __init__(self, root, workers):
        from timm.data import create_dataset, create_transform
        from timm.data.loader import fast_collate

        images = create_dataset("", root)
        images.transform = create_transform(
            SIZE, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bilinear"
        )
        self.images = len(images) // BATCH * BATCH
        self.loader = data.DataLoader(
            images, BATCH, shuffle=True, num_workers=workers, drop_last=True, collate_fn=fast_collate
        )


class Dali:
    """DALI on the CPU with one thread: fused decoding of the crop, resize and flip to uint8 batches."""

    def __init__(self, root, workers):
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def pipeline():
            files, labels = fn.readers.file(file_root=root, random_shuffle=True, name="files")
            pixels = fn.decoders.image_random_crop(
                files, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
            )
            pixels = fn.resize(pixels, resize_x=SIZE, resize_y=SIZE, interp_type=types.INTERP_TRIANGULAR)
            return fn.flip(pixels, horizontal=fn.random.coin_flip()), labels

        self.pipeline = pipeline()
        self.pipeline.build()
        self.images = self.pipeline.epoch_size("files") // BATCH * BATCH

    def __call__(self):
        for _ in range(self.images // BATCH):
            self.pipeline.run()

    def close(self):
        del self.pipeline


def decode_rate(root, clock):
    """Images/s of decoding every file once, to all its pixels."""
    images = index.load_folder(root)
    contents = [images.read(i) for i in range(len(images))]
    heads = [(content, jpeg.header(content)) for content in contents]
    started = clock()
    for content, head in heads:
        jpeg.decode(content, head, head.height)
    return len(heads) / (clock() - started)


def compare(name, what, against, make_plain, make_ours, rounds, clock, to, limit, note=""):
    """Time `rounds` pairs of epochs; prints and records the ratio of images per second."""
    sides = []
    try:
        for make in (make_plain, make_ours):
            sides.append(make())
            sides[-1]()  # starts the workers, fills the file cache
        rates = ([], [])
        for _ in range(rounds):
            for side, found in zip(sides, rates, strict=True):
                started = clock()
                side()
                found.append(side.images / (clock() - started))
    finally:
        for side in sides:
            side.close()
    ratios = [ours / plain for plain, ours in zip(*rates, strict=True)]
    plain, ours = map(statistics.median, rates)
    bound = record.limited(LIMIT, ours / limit)
    print(
        f"{what}: {against} {plain:.0f} images/s, ours {ours:.0f} images/s, median ratio "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{100 * bound['fraction']:.0f} % of the rate of {LIMIT}",
        flush=True,
    )
    record.record(to, name, what, against, **record.compared(ratios), **bound, **({"note": note} if note else {}))


def pixel_difference(original, packed):
    """Mean absolute difference of evaluation pixels, levels, between a folder and its packed set."""
    crop, found = transforms.eval_crop_transform(_spec()), []
    for i in range(min(len(original), 100)):
        a, b = (np.asarray(crop(decode.open_rgb(x.path(i), x.read(i))), int) for x in (original, packed))
        found.append(np.abs(a - b).mean())
    return statistics.mean(found)


def _spec():
    from inception_v3.spec import SPEC

    return SPEC


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=pathlib.Path, help="folder of JPEG files; those of 500 x 375 pixels are taken")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of rows")
    record.add_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        photos = args.photos or bench_deploy.drawn_photos(folder)
        chosen = [path for path in sorted(photos.iterdir()) if sorted(Image.open(path).size) == [375, 500]]
        of = f"{len(chosen)} {'photographs' if args.photos else 'drawn images'} of 500 x 375"
        for i, path in enumerate(chosen * -(-IMAGES // len(chosen))):
            (folder / "set" / str(i % CLASSES)).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / "set" / str(i % CLASSES) / f"{i:04d}.jpg")
        root, packed = str(folder / "set"), str(folder / "packed")
        run(args, root, packed, of)


def run(args, root, packed, of):
    pil, rounds, to = "ImageFolder, PIL, ToTensor, Normalize", args.rounds, args.record
    cores = sorted(os.sched_getaffinity(0))

    def wanted(name):
        return not args.only or name in args.only

    if len(cores) > 1 and wanted("pipeline_two_cores"):
        rate = decode_rate(root, time.perf_counter)
        compare(
            "pipeline_two_cores",
            f"training input, {of}, two workers",
            pil,
            lambda: Plain(root, 2),
            lambda: Ours(root, 2),
            rounds,
            time.perf_counter,
            to,
            2 * rate,
        )
    os.sched_setaffinity(0, cores[:1])
    clock, rate = time.process_time, decode_rate(root, time.process_time)
    one = f"training input, {of}, one core"
    if wanted("pipeline"):
        compare("pipeline", one, pil, lambda: Plain(root, 0), lambda: Ours(root, 0), rounds, clock, to, rate)
    if wanted("pipeline_torchvision"):
        installed = jpeg._simplejpeg
        jpeg._simplejpeg = lambda: None
        what, slower = f"{one}, without simplejpeg", decode_rate(root, clock)
        compare(
            "pipeline_torchvision", what, pil, lambda: Plain(root, 0), lambda: Ours(root, 0), rounds, clock, to, slower
        )
        jpeg._simplejpeg = installed
    if wanted("pipeline_jitter"):
        what, against = f"{one}, color jitter 0.4", f"{pil}, ColorJitter on PIL"
        compare(
            "pipeline_jitter",
            what,
            against,
            lambda: Plain(root, 0, 0.4),
            lambda: Ours(root, 0, color_jitter=0.4),
            rounds,
            clock,
            to,
            rate,
        )
    if wanted("pipeline_packed"):
        command = [
            sys.executable,
            str(ROOT / "tools" / "pack_data.py"),
            root,
            packed,
            "--short-side=400",
            "--quality=90",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        difference = pixel_difference(index.load_folder(root), index.load_folder(packed))
        compare(
            "pipeline_packed",
            f"{one}, packed with --short-side 400 --quality 90",
            f"{pil}, on the original",
            lambda: Plain(root, 0),
            lambda: Ours(packed, 0),
            rounds,
            clock,
            to,
            decode_rate(packed, clock),
            f"evaluation pixels differ by {difference:.1f} of 255 in the mean",
        )
    for name, peer, package, against in (
        ("pipeline_timm", Timm, "timm", "timm's transform and collate function"),
        ("pipeline_dali", Dali, "nvidia.dali", "DALI on the CPU, one thread, uint8"),
    ):
        if wanted(name) and _is_installed(package):
            compare(name, one, against, lambda peer=peer: peer(root, 0), lambda: Ours(root, 0), rounds, clock, to, rate)


def _is_installed(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
