"""The whole chain on real photographs: every format and batch size must give the counts that were placed in the labels.

    python tests/real_chain.py --photos FOLDER --count 299 --columns 1000

The network is Inception v4 with random weights, batch-norm statistics of one pass over these photographs, and labels at
ranks 1 to 6 of torch's own logits. Takes about ten passes over the photographs: a quarter of an hour for 299 on two
cores.
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import calibrated, hits_printed, labels_at_ranks, plain_input, run_ok

RUNS = (("TXT", 1), ("NPY", 4), ("BIN", 8))


def place_labels(files, folder, columns, size):
    """Write FOLDER/val, val_label.txt and net.pth, a checkpoint with a background class.

    Returns:
      hits at top-1..top-5 that any correct path must count.
    """
    import torch

    inputs = np.stack([plain_input(path, size) for path in files])
    model = calibrated(1001, inputs)
    with torch.inference_mode():
        logits = np.concatenate([model(images).numpy() for images in torch.from_numpy(inputs).split(16)])
    torch.save(model.state_dict(), folder / "net.pth")
    background = columns - 1000
    labels, hits = labels_at_ranks(logits[:, 1 - background :], background)
    (folder / "val").mkdir()
    for path in files:
        (folder / "val" / path.name).symlink_to(path)
    (folder / "val_label.txt").write_text(
        "".join(f"{path.name} {label}\n" for path, label in zip(files, labels, strict=True))
    )
    return list(map(int, hits))


def score(folder, name, prepared, outfmt, batch, threads, *more):
    """run_onnx and postprocess."""
    run_ok(
        "tools/run_onnx.py",
        "--model",
        folder / "net.onnx",
        "--input",
        folder / prepared,
        "--output",
        folder,
        "--output_dirname",
        name,
        "--outfmt",
        outfmt,
        "--batchsize",
        batch,
        "--threads",
        threads,
        *more,
    )
    return hits_printed(
        run_ok(
            "inception_v4/postprocess.py",
            "--infer_results",
            folder / name,
            "--anno_file",
            folder / "val_label.txt",
            "--metrics_json",
            folder / f"{name}.json",
        )
    )


def chain(files, folder, columns, size, threads=1, tell=lambda words: None):
    """Every path through the programs.

    Returns:
      (placed hits, {path in words: hits that it printed}); the last two paths normalize in float16.
    """
    placed, found = place_labels(files, folder, columns, size), {}

    def note(words, hits):
        found[words] = hits
        tell(f"{words}: {' '.join(map(str, hits))}")

    tell(f"placed: {' '.join(map(str, placed))}")
    sized = ("--image-size", size)
    evaluated = ("inception_v4/eval.py", "--data", folder, "--threads", threads, "-b", 16, "--resume")
    note(
        "eval.py, torch",
        hits_printed(run_ok(*evaluated, folder / "net.pth", "--num-classes", columns, *sized, "--device", "cpu")),
    )
    run_ok(
        "inception_v4/pth2onnx.py",
        "--ckpt",
        folder / "net.pth",
        "--onnx",
        folder / "net.onnx",
        "--num-classes",
        columns,
        *sized,
    )
    for dtype in ("float32", "uint8"):
        run_ok(
            "inception_v4/preprocess.py",
            "--src_path",
            folder / "val",
            "--save_path",
            folder / dtype,
            "--dtype",
            dtype,
            *sized,
        )
    for outfmt, batch in RUNS:
        note(f"files, {outfmt}, batch {batch}", score(folder, f"result_{outfmt}", "float32", outfmt, batch, threads))
    run_ok(
        "tools/run_atc.py",
        "--model",
        folder / "net.onnx",
        "--output",
        folder / "net",
        "--aipp",
        "--soc-version",
        "Ascend310P3",
        "--dry-run",
    )
    (config,) = folder.glob("*_aipp.cfg")
    aipp = ("--aipp-config", config)
    note("uint8 files, AIPP", score(folder, "result_aipp", "uint8", "NPY", 8, threads, *aipp))
    note("eval.py, ONNX, AIPP", hits_printed(run_ok(*evaluated, folder / "net.onnx", *aipp)))
    return placed, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, type=pathlib.Path, help="folder of images")
    parser.add_argument("--count", type=int, default=299, help="how many; neither 4 nor 8 divides 299")
    parser.add_argument("--columns", type=int, default=1000, choices=(1000, 1001))
    parser.add_argument("--image-size", type=int, default=299)
    args = parser.parse_args()
    files = sorted(args.photos.absolute().iterdir())[: args.count]
    with tempfile.TemporaryDirectory() as name:
        placed, found = chain(
            files, pathlib.Path(name), args.columns, args.image_size, 2, lambda words: print(words, flush=True)
        )
    different = [words for words, hits in found.items() if hits != placed]
    print(
        f"{len(files)} images, {args.columns} columns, {args.image_size} pixels: "
        + (f"other counts from {', '.join(different)}" if different else "the same counts on every path")
    )


if __name__ == "__main__":
    main()
