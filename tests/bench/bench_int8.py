"""int8 files of tools/quantize.py: loss, agreement, and speed against the float32 file, in turns (A B A B).

    python tests/bench/bench_int8.py --data DIR --photos FOLDER --ckpt model_best.pth.tar --calibration-data OTHERS
    python tests/bench/bench_int8.py --data DIR --photos FOLDER --what xception

DIR is a dataset root, FOLDER and OTHERS hold photographs of other things: those in FOLDER measure the agreement, and a
part of them the speed, those in OTHERS calibrate. With a checkpoint of Inception v3 the limits are 0.7 points of top-1
and 99 % agreement, with --float-fallback. The other networks have random weights with calibrated batch norms and as
many classes as DIR; their speed and agreement count, their accuracy does not.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import numpy as np
import record
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import calibrated

from common.data import index
from common.data.loader import EvalLoader
from common.data.transforms import eval_transform, normalize_into
from common.deploy import export, quantize
from common.evaluation import engines, predict
from common.weights.load import load_model
from tools import models

BATCH = 8


def random_weights(spec, data, num_classes, size):
    """A network whose batch norms fit 16 training images."""
    found = index.load_folder(data / "train")
    transform, images = eval_transform(spec, size), np.empty((16, 3, size, size), np.float32)
    for i, planes in zip(np.linspace(0, len(found) - 1, 16, dtype=int), images, strict=True):
        normalize_into(planes, transform(Image.open(found.path(i)).convert("RGB")), spec.mean, spec.std)
    return calibrated(num_classes, images, spec).eval()


def seconds(engine, batches):
    start = time.perf_counter()
    for images in batches:
        engine.run(images)
    return time.perf_counter() - start


def end_to_end(path, spec, found, size):
    """Seconds from JPEG files to logits, with two dataloader workers."""
    classifier = engines.EngineClassifier(engines.OnnxEngine(path), spec)
    loader = EvalLoader(found, eval_transform(spec, size), 32, "fail", 0, 1, 2, False)
    start = time.perf_counter()
    for batch in loader:
        classifier(batch.pixels_NHWC)
    elapsed = time.perf_counter() - start
    loader.close()
    return elapsed


def measure(name, args, folder):
    spec = models.spec(name)
    data = pathlib.Path(args.data)
    found = index.load_folder(data / "val")
    is_trained = name == "inception_v3"
    size, source, target = args.image_size, folder / f"{name}.onnx", folder / f"{name}_int8.onnx"
    model = load_model(args.ckpt, spec)[0] if is_trained else random_weights(spec, data, len(found.classes), size)
    export.export_onnx(model, spec, source, size, classes=found.classes)
    options = dict(max_drop=0.7, min_agreement=99, float_fallback=True) if is_trained else dict(max_drop=100)
    config = quantize.QuantizeConfig(
        data=str(data),
        agreement_data=args.photos,
        calibration_data=args.calibration_data,
        images=args.images,
        calibration=args.calibration,
        **options,
    )
    if not target.exists():
        quantize.quantize(str(source), str(target), config, lambda _: spec)
    paths = predict.list_images(args.photos)
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(args.timed, len(paths))).astype(int)]
    photos, transform = index.of_files(chosen, [0] * len(chosen)), eval_transform(spec, size)
    images = np.empty((len(photos), 3, size, size), np.float32)
    for i, planes in enumerate(images):
        normalize_into(planes, transform(photos.image(i)), spec.mean, spec.std)
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    before, after = engines.OnnxEngine(source), engines.OnnxEngine(target)
    best = after.metadata["quantization"]
    seconds(before, batches[:1]), seconds(after, batches[:1])
    ratios = [seconds(before, batches) / seconds(after, batches) for _ in range(args.turns)]
    whole = [end_to_end(source, spec, photos, size) / end_to_end(target, spec, photos, size) for _ in range(3)]
    accuracy = (
        f"top-1 {best['acc1_before']:.2f} to {best['acc1_after']:.2f} % of {best['images']} images"
        if is_trained
        else "random weights with calibrated batch norms"
    )
    note = (
        f"{accuracy}; agreement {best['agreement']:.2f} % of {best['agreement_images']}, "
        f"{best['agreed_further']} of {best['further_images']} without those of val/; {best['method']} of "
        f"{best['calibration_images']} images, {len(best['float_layers'])} convolutions in float32"
    )
    if best["fallback_margin"]:
        share = 100 * best["fallback_images"] / best["agreement_images"]
        note += f", {share:.2f} % of the images again in float32"
    if args.note:
        note = f"{note}; {args.note}"
    against = "the same network in float32, ONNX Runtime"
    for ratio, what in ((ratios, f"batch {BATCH}"), (whole, f"from {len(photos)} JPEG files to logits")):
        row = record.compared(ratio)
        print(f"{name} int8, {what}: {row['ratio']} ({row['range'][0]} to {row['range'][1]}); {note}", flush=True)
        kind = "" if what.startswith("batch") else "_files"
        record.record(
            args.record, f"int8_{name}{kind}", f"int8 {name}, {size} pixels, {what}", against, **row, note=note
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--ckpt", help="of Inception v3")
    parser.add_argument("--what", choices=models.names(), action="append", help="default: inception_v3")
    parser.add_argument("--calibration-data", default="")
    parser.add_argument("--timed", type=int, default=256, help="photographs that measure the speed")
    parser.add_argument("--images", type=int, default=256, help="of each folder that calibrate")
    parser.add_argument("--calibration", default="minmax", choices=("all", *quantize.calibrate.METHODS))
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--work", help="folder that keeps the files; those in it are used again")
    parser.add_argument("--note", help="of the rows, for example what else ran")
    record.add_option(parser)
    args = parser.parse_args()
    for name in args.what or ["inception_v3"]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(args.work or temporary)
            folder.mkdir(exist_ok=True)
            measure(name, args, folder)


if __name__ == "__main__":
    main()
