"""Time of the deployment programs compared with plain ones, in turns (A B A B).

    python tests/bench/bench_deploy.py
    python tests/bench/bench_deploy.py --what preprocess --photos FOLDER

Prints the seconds of each turn and the median ratio; preprocess also compares the bytes. The images in FOLDER, or drawn
ones of 500 x 375 pixels, are repeated until there are --files. All output goes to a temporary folder. Start-up is part
of each time.
"""

import argparse
import filecmp
import itertools
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import record
from PIL import Image

REPO = pathlib.Path(__file__).resolve().parents[2]


def seconds(command, fresh=None):
    """Wall-clock time of a command that must succeed; `fresh` is deleted first.

    No command pays for the files of another one: those are on the disk before it starts, and deleted long enough. For
    five seconds, ext4 passes over the inodes of deleted files, one at a time for each new file.
    """
    if fresh is not None and fresh.exists():
        shutil.rmtree(fresh)
        time.sleep(6)
    os.sync()
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def in_turns(name, plain, ours, turns, limit, bound):
    """Fields of a row for `turns` pairs; prints them all.

    Args:
      plain, ours: seconds of a run.
      limit: what bounds ours.
      bound: seconds that ours takes at that limit, measured in the same turns.
    """
    pairs = [(plain(), ours(), bound()) for _ in range(turns)]
    ratios = [a / b for a, b, _ in pairs]
    row = record.compared(ratios) | record.limited(limit, statistics.median(c / b for _, b, c in pairs))
    print(
        f"{name}: plain {' '.join(f'{a:.2f}' for a, _, _ in pairs)} s, "
        f"ours {' '.join(f'{b:.2f}' for _, b, _ in pairs)} s, "
        f"median ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f}), "
        f"limit: {limit}, share reached: {row['fraction']:.2f}",
        flush=True,
    )
    return row


def decode_and_resize(source):
    """Seconds that one core takes for PIL's part of preprocess.py: decode, resize and crop each image of a folder."""
    sys.path.insert(0, str(REPO))
    from common.data import decode, transforms
    from inception_v4.spec import SPEC

    crop, start = transforms.eval_crop_transform(SPEC), time.process_time()
    for path in source.iterdir():
        crop(decode.open_rgb(path))
    return time.process_time() - start


def read_all(folder):
    """Seconds to read each file of a folder."""
    start = time.perf_counter()
    for path in folder.iterdir():
        path.read_bytes()
    return time.perf_counter() - start


def drawn_photos(folder):
    """100 JPEG files of 500 x 375 pixels, with noise that gives them the file size of photographs."""
    sys.path.insert(0, str(REPO / "tools"))
    from make_sample_data import SampleConfig, make

    make(folder / "drawn", SampleConfig(train_per_class=10, val_per_class=1))
    photos, rng = folder / "photos", np.random.default_rng(0)
    photos.mkdir()
    for path in sorted((folder / "drawn" / "train").rglob("*.JPEG")):
        pixels = np.asarray(Image.open(path).convert("RGB").resize((500, 375)), np.float32)
        grainy = np.clip(pixels + rng.normal(scale=6, size=pixels.shape), 0, 255)
        Image.fromarray(grainy.astype(np.uint8)).save(photos / path.name, quality=95)
    return photos


def preprocess(photos, num_files, turns, folder, record_to):
    """Both dtypes against the plain float32 program."""
    images = f"{num_files:,} {'photographs' if photos else 'drawn images'}"
    source = folder / "val"
    source.mkdir()
    photos = pathlib.Path(photos) if photos else drawn_photos(folder)
    for i, path in zip(range(num_files), itertools.cycle(sorted(photos.iterdir()))):
        shutil.copy(path, source / f"image_{i:05d}.JPEG")
    plain, cores = REPO / "tests" / "bench" / "plain_preprocess.py", len(os.sched_getaffinity(0))
    for dtype in ("float32", "uint8"):
        ours = [
            REPO / "inception_v4" / "preprocess.py",
            "--src_path",
            source,
            "--save_path",
            folder / "b",
            "--dtype",
            dtype,
        ]
        row = in_turns(
            f"preprocess {dtype}, {num_files} images",
            lambda: seconds([plain, source, folder / "a"], folder / "a"),
            lambda command=ours: seconds(command, folder / "b"),
            turns,
            f"PIL's decoding and resizing alone on {cores} cores",
            lambda: decode_and_resize(source) / cores,
        )
        what, against = f"preprocess.py, {images}, {dtype}", "one process with PIL and numpy"
        record.record(record_to, f"preprocess_{dtype}", what, against, **row)
        if dtype == "float32":
            names = [path.name for path in (folder / "a").iterdir()]
            _, different, missing = filecmp.cmpfiles(folder / "a", folder / "b", names, shallow=False)
            print(f"bytes: {len(names)} files compared, {len(different) + len(missing)} differ")


def postprocess(num_files, turns, folder, record_to):
    """TXT results of 1001 numbers."""
    rng = np.random.default_rng(0)
    rows = ["%f " * 1001 % tuple((3 * rng.normal(size=1001)).tolist()) + "\n" for _ in range(500)]
    (folder / "res").mkdir()
    with (folder / "labels.txt").open("w") as labels:
        for i in range(num_files):
            (folder / "res" / f"image_{i:05d}_0.txt").write_text(rows[i % 500])
            labels.write(f"image_{i:05d}.JPEG {7 * i % 1000}\n")
    ours = [
        REPO / "inception_v4" / "postprocess.py",
        "--infer_results",
        folder / "res",
        "--anno_file",
        folder / "labels.txt",
        "--metrics_json",
        folder / "m.json",
    ]
    plain = [REPO / "tests" / "bench" / "plain_postprocess.py", folder / "res", folder / "labels.txt"]
    row = in_turns(
        f"postprocess, {num_files} results",
        lambda: seconds(plain),
        lambda: seconds(ours),
        turns,
        "reading the files alone, one process",
        lambda: read_all(folder / "res"),
    )
    command = [sys.executable, *map(str, ours)]
    done = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(done.pid, 0)
    memory = f"{usage.ru_maxrss / 1024:.0f} MB"
    print(f"largest process: {memory}")
    record.record(
        record_to,
        "postprocess",
        f"postprocess.py, {num_files:,} text results of 1001 numbers",
        "a loop with `split`, `float` and a sort",
        **row,
        note=f"peak memory {memory}",
    )


def run_onnx(num_files, turns, folder, size, batch, record_to):
    """End to end, without loading the model, against ONNX Runtime on arrays in memory."""
    import onnxruntime

    sys.path.insert(0, str(REPO))
    from common.deploy import export
    from inception_v4.spec import SPEC

    export.export_onnx(SPEC.build(num_classes=1001), SPEC, folder / "net.onnx", size)
    (folder / "prep").mkdir()
    images = np.random.default_rng(0).normal(size=(num_files, 3, size, size)).astype(np.float32)
    for i, image in enumerate(images):
        image.tofile(folder / "prep" / f"image_{i:05d}.bin")
    session = onnxruntime.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])

    def ready_arrays():
        start = time.perf_counter()
        for i in range(0, num_files, batch):
            session.run(None, {"image": images[i : i + batch]})
        return time.perf_counter() - start

    from common.deploy import onnx_runtime

    def files():
        shutil.rmtree(folder / "res", ignore_errors=True)
        (folder / "res_summary.json").unlink(missing_ok=True)
        config = onnx_runtime.RunOnnxConfig(
            model=str(folder / "net.onnx"),
            input=str(folder / "prep"),
            output=str(folder),
            output_dirname="res",
            outfmt="TXT",
            batchsize=batch,
            warmup_count=0,
        )
        start = time.perf_counter()
        onnx_runtime.run(config)
        return time.perf_counter() - start

    def load():
        start = time.perf_counter()
        onnxruntime.InferenceSession(str(folder / "net.onnx"), providers=["CPUExecutionProvider"])
        return time.perf_counter() - start

    ready_arrays()
    loading = statistics.median(load() for _ in range(3))
    print(f"loading the model: {loading:.2f} s, taken off our times")
    row = in_turns(
        f"run_onnx, {num_files} images of {size} pixels, batch {batch}, TXT",
        ready_arrays,
        lambda: files() - loading,
        turns,
        "ONNX Runtime alone",
        ready_arrays,
    )
    what = f"run_onnx.py from files to results, {num_files} images of {size} pixels, batch {batch}"
    against = "ONNX Runtime alone on arrays in memory"
    record.record(record_to, "run_onnx", what, against, **row)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("preprocess", "postprocess", "run_onnx"), help="one of them; default all")
    parser.add_argument("--photos", help="folder of images for preprocess")
    parser.add_argument("--files", type=int, help="how many files (900, 50000 and 64)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=299)
    parser.add_argument("--batch", type=int, default=8)
    record.add_option(parser)
    args = parser.parse_args()
    to = args.record
    benches = {
        "preprocess": lambda folder: preprocess(args.photos, args.files or 900, args.turns, folder, to),
        "postprocess": lambda folder: postprocess(args.files or 50_000, args.turns, folder, to),
        "run_onnx": lambda folder: run_onnx(args.files or 64, args.turns, folder, args.image_size, args.batch, to),
    }
    for name, bench in benches.items():
        if args.what in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                bench(pathlib.Path(folder))


if __name__ == "__main__":
    main()
