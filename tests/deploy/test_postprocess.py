"""Scoring: hand-computed accuracies, the three file kinds, and every input that must be refused."""

import json
import os

import numpy as np
import pytest
from support import fails, run_script

SCRIPT = "inception_v4/postprocess.py"


def row(columns, label, rank):
    """Scores whose entry `label` is at position `rank` (0 is the highest)."""
    scores = np.linspace(-5, 5, columns, dtype=np.float32)
    order = np.argsort(-scores)
    position = order[rank]
    scores[[label, position]] = scores[[position, label]]
    return scores


def write(folder, name, scores, kind):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}_0.{kind}"
    if kind == "txt":
        path.write_text("".join(f"{value:f} " for value in scores) + "\n")
    elif kind == "npy":
        np.save(path, scores[None])
    else:
        scores.tofile(path)
    return path


RANKS = [0, 0, 1, 2, 4, 5]  # top1 2, top2 3, top3 4, top4 4, top5 5 of 6


@pytest.fixture(params=["txt", "npy", "bin"])
def kind(request):
    return request.param


def results(folder, columns, kind):
    """Six results with labels at RANKS; the label file counts from 0 without a background class."""
    offset = columns - 1000
    labels = []
    for i, rank in enumerate(RANKS):
        write(folder / "res", f"img_{i}", row(columns, 10 * i + offset, rank), kind)
        labels.append(f"img_{i}.JPEG {10 * i}\n")
    (folder / "labels.txt").write_text("".join(labels))
    return [
        "--infer_results",
        folder / "res",
        "--anno_file",
        folder / "labels.txt",
        "--metrics_json",
        folder / "metrics.json",
    ]


@pytest.mark.parametrize("columns", [1000, 1001])
def test_hand_computed(columns, kind, tmp_path):
    done = run_script(SCRIPT, *results(tmp_path, columns, kind))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "title": "Overall statistical evaluation",
        "value": [
            {"key": "Number of images", "value": "6"},
            {"key": "Number of classes", "value": str(columns)},
            {"key": "Top1 accuracy", "value": "33.33%"},
            {"key": "Top2 accuracy", "value": "50.00%"},
            {"key": "Top3 accuracy", "value": "66.67%"},
            {"key": "Top4 accuracy", "value": "66.67%"},
            {"key": "Top5 accuracy", "value": "83.33%"},
        ],
    }
    assert "top1   33.33 %  (2 of 6 images)" in done.stdout


def test_float16_and_exponents(tmp_path):
    arguments = results(tmp_path, 1000, "bin")
    for path in (tmp_path / "res").iterdir():
        np.fromfile(path, np.float32).astype(np.float16).tofile(path)
    assert "(2 of 6 images)" in run_script(SCRIPT, *arguments).stdout
    arguments = results(tmp_path, 1000, "txt")
    for path in (tmp_path / "res").glob("*.bin"):
        path.unlink()
    for path in (tmp_path / "res").glob("*_3_0.txt"):  # one file that is not "%f" among those that are
        path.write_text(" ".join(f"{value:.9e}" for value in map(float, path.read_text().split())))
    assert "(2 of 6 images)" in run_script(SCRIPT, *arguments).stdout


def test_hidden_copies_of_results_are_no_results(tmp_path):
    arguments = results(tmp_path, 1000, "txt")
    (tmp_path / "res" / "._img_0_0.txt").write_bytes(b"AppleDouble")
    assert "(2 of 6 images)" in run_script(SCRIPT, *arguments).stdout


@pytest.mark.parametrize("columns", [1000, 1001])
def test_labels_from_1_are_suspected_and_read_on_request(columns, tmp_path):
    arguments = results(tmp_path, columns, "bin")
    (tmp_path / "labels.txt").write_text("".join(f"img_{i} {10 * i + 1}\n" for i in range(6)))
    done = run_script(SCRIPT, *arguments)
    assert (
        done.returncode == 0
        and (
            "note: top-1 is 0.00 %, and 33.33 % if every label were one smaller; the file holds no label 0: "
            "if it counts from 1, give --label-numbers=from-1"
        )
        in done.stdout.splitlines()
    )
    done = run_script(SCRIPT, *arguments, "--label-numbers=from-1")
    assert "(2 of 6 images)" in done.stdout and "one smaller" not in done.stdout
    (tmp_path / "labels.txt").write_text("".join(f"img_{i} {1000 if i == 5 else 10 * i + 1}\n" for i in range(6)))
    fails(
        run_script(SCRIPT, *arguments),
        "labels.txt: label 1000, the classes are 0..999; the file holds no label 0: if it counts from 1, give",
    )


def test_numbers_without_names_belong_to_the_sorted_results(tmp_path):
    arguments = results(tmp_path, 1000, "bin")
    (tmp_path / "labels.txt").write_text("".join(f"{10 * i + 1}\n" for i in range(6)))
    assert "(2 of 6 images)" in run_script(SCRIPT, *arguments, "--label-numbers=from-1").stdout
    with (tmp_path / "labels.txt").open("a") as file:
        file.write("3\n")
    fails(run_script(SCRIPT, *arguments, "--label-numbers=from-1"), "holds 7 numbers without image names", "6 images")


def test_equal_scores_go_to_the_lower_index(tmp_path):
    scores = np.zeros(1000, np.float32)
    for name, label in (("a", 0), ("b", 1), ("c", 5)):
        write(tmp_path / "res", name, scores, "txt")
        with (tmp_path / "labels.txt").open("a") as file:
            file.write(f"{name}.JPEG {label}\n")
    done = run_script(
        SCRIPT,
        "--infer_results",
        tmp_path / "res",
        "--anno_file",
        tmp_path / "labels.txt",
        "--metrics_json",
        tmp_path / "m.json",
    )
    assert [line.split("(")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("top")] == [
        "1",
        "2",
        "2",
        "2",
        "2",
    ]


def test_missing_results_are_named_or_left_out(tmp_path):
    arguments = results(tmp_path, 1001, "npy")
    (tmp_path / "res" / "img_4_0.npy").unlink()
    fails(run_script(SCRIPT, *arguments), "1 images: img_4", "--allow-missing")
    assert not (tmp_path / "metrics.json").exists()
    done = run_script(SCRIPT, *arguments, "--allow-missing")
    assert "(2 of 5 images)" in done.stdout and "1 labelled images have no result" in done.stdout
    assert json.loads((tmp_path / "metrics.json").read_text())["value"][0]["value"] == "5"


def write_summary(path, outfiles, model="net_a.om", more=(), runs=None, batch=1, earlier=0):
    """A summary of a run that wrote these files, `earlier` seconds before now."""
    filesinfo = {str(i): {"infiles": [f"{out}.bin"], "outfiles": [out]} for i, out in enumerate(outfiles)}
    mean = 2.5
    content = {
        "filesinfo": filesinfo,
        "args": ["/x/ais_bench/__main__.py", "--model", model, "--outfmt", "TXT", *more],
        "NPU_compute_time": {"count": len(outfiles) if runs is None else runs, "mean": mean},
        "throughput": 1000 * batch / mean,
    }
    path.write_text(json.dumps(content))
    moment = path.stat().st_mtime_ns - earlier * 10**9
    os.utime(path, ns=(moment, moment))


NAMES = [f"res/img_{i}_0.txt" for i in range(6)]


@pytest.mark.parametrize("place", ["res_summary.json", "res/_summary.json", "res/sumary.json", "res_sumary.json"])
def test_files_of_an_earlier_run_are_found_by_the_summary(place, tmp_path):
    arguments = results(tmp_path, 1000, "txt")
    write_summary(tmp_path / place, NAMES)
    done = run_script(SCRIPT, *arguments)
    assert done.returncode == 0 and "no summary" not in done.stdout
    write_summary(tmp_path / place, NAMES[:2] + NAMES[3:])
    fails(run_script(SCRIPT, *arguments), "1 files", "not in the summary", place, "net_a.om", "img_2_0.txt of 20")


def test_two_summaries_are_two_runs(tmp_path):
    """One run with, one without a slash behind --output_dirname."""
    arguments = results(tmp_path, 1000, "txt")
    write_summary(tmp_path / "res_summary.json", NAMES[:4])
    write_summary(tmp_path / "res" / "_summary.json", NAMES[4:], model="net_b.om")
    fails(
        run_script(SCRIPT, *arguments), "two runs", "res_summary.json (net_a.om, 20", "res/_summary.json (net_b.om, 20"
    )
    assert not (tmp_path / "metrics.json").exists()


def test_a_second_run_that_died_half_way_is_noticed(tmp_path):
    arguments = results(tmp_path, 1000, "txt")
    write_summary(tmp_path / "res_summary.json", NAMES, earlier=60)
    for i in range(6):
        moment = (tmp_path / "res_summary.json").stat().st_mtime_ns - (i - 1) * 10**9
        os.utime(tmp_path / NAMES[i], ns=(moment, moment))
    fails(run_script(SCRIPT, *arguments), "1 files", "newer than the summary", "net_a.om", "img_0_0.txt of 20", "cp -a")
    os.utime(tmp_path / NAMES[0], ns=(0, (tmp_path / "res_summary.json").stat().st_mtime_ns))
    assert run_script(SCRIPT, *arguments).returncode == 0  # written in the same tick of the clock


def test_results_without_a_summary_are_scored_with_a_note(tmp_path):
    done = run_script(SCRIPT, *results(tmp_path, 1000, "npy"))
    assert done.returncode == 0 and "note: " in done.stdout and "has no summary" in done.stdout


def on_devices(folder, *, second="net_a.om"):
    """Move the results of `results(folder, 1000, "bin")` to two devices."""
    for i in range(6):
        device = folder / "res" / f"device{i % 2}_{i % 2}"
        device.mkdir(exist_ok=True)
        (folder / "res" / f"img_{i}_0.bin").rename(device / f"img_{i}_0.bin")
    for i, model in enumerate(("net_a.om", second)):
        names = [f"img_{k}_0.bin" for k in range(i, 6, 2)]
        write_summary(folder / "res" / f"device{i}_{i}_summary.json", names, model=model)


def test_every_device_has_the_summary_of_the_same_run(tmp_path):
    arguments = results(tmp_path, 1000, "bin")
    on_devices(tmp_path)
    assert "(2 of 6 images)" in run_script(SCRIPT, *arguments).stdout
    summary = tmp_path / "res" / "device1_1_summary.json"
    written = summary.read_text()
    write_summary(summary, ["img_1_0.bin", "img_3_0.bin", "img_5_0.bin"], model="net_b.om")
    fails(
        run_script(SCRIPT, *arguments),
        "two runs",
        "device0_0_summary.json (net_a.om",
        "device1_1_summary.json (net_b.om",
    )
    summary.unlink()
    fails(run_script(SCRIPT, *arguments), "device1_1 has no summary", "device0_0_summary.json (net_a.om")
    summary.write_text(written)
    (tmp_path / "res" / "img_0_0.bin").write_bytes((tmp_path / "res/device0_0/img_0_0.bin").read_bytes())
    (tmp_path / "res/device0_0/img_0_0.bin").unlink()
    write_summary(tmp_path / "res_summary.json", ["img_0_0.bin"])  # the same command, on one device
    fails(run_script(SCRIPT, *arguments), "two runs", "res_summary.json (net_a.om", "device0_0_summary.json (net_a.om")


@pytest.mark.parametrize(
    ("more", "runs", "batch", "is_right"),
    [
        ([], 2, 4, True),
        ([], 3, 4, False),  # of a float16 model that took one float32 file for two images
        (["--loop=10"], 20, 4, True),
        (["-l", "10"], 30, 4, False),
        (["--pipeline", "--threads", "2"], 3, 4, True),
    ],
)
def test_bin_files_of_several_rows_are_noticed_by_the_number_of_runs(more, runs, batch, is_right, tmp_path):
    """Two rows of 1000 float16 numbers have the size of one row of 1000 float32 numbers."""
    arguments = results(tmp_path, 1000, "bin")
    write_summary(
        tmp_path / "res_summary.json", [f"img_{i}_0.bin" for i in range(6)], more=more, runs=runs, batch=batch
    )
    done = run_script(SCRIPT, *arguments)
    if is_right:
        assert done.returncode == 0, done.stderr
    else:
        fails(done, "net_a.om", "took 3 executions for 6 files, 4 images each", "several rows", "--batchsize")


def test_results_of_several_devices(tmp_path):
    arguments = results(tmp_path, 1000, "bin")
    for i, path in enumerate(sorted((tmp_path / "res").iterdir())):
        folder = tmp_path / "res" / f"device{i % 2}"
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    assert "(2 of 6 images)" in run_script(SCRIPT, *arguments).stdout
    twice = tmp_path / "res" / "device1" / "img_0_0.bin"
    twice.write_bytes((tmp_path / "res" / "device0" / "img_0_0.bin").read_bytes())
    fails(run_script(SCRIPT, *arguments), str(twice), "a second result for img_0")


def spoil(name, content):
    def change(folder):
        path = folder / name
        if isinstance(content, np.ndarray):
            content.tofile(path) if path.suffix == ".bin" else np.save(path, content)
        elif content is None:
            path.unlink()
        else:
            path.write_text(content)

    return change


NAN = "nan " + "1.000000 " * 999 + "\n"
BAD = {
    "columns": (spoil("res/img_1_0.txt", "1.000000 " * 999 + "\n"), ["img_1_0.txt", "999 columns", "1000"]),
    "nan": (spoil("res/img_1_0.txt", NAN), ["img_1_0.txt", "column 0 is NaN"]),
    "infinite": (spoil("res/img_1_0.txt", NAN.replace("nan", "-inf")), ["img_1_0.txt", "column 0 is NaN or infinite"]),
    "words": (spoil("res/img_1_0.txt", "1.000000 " * 500 + "abc " + "1.000000 " * 499 + "\n"), ["img_1_0.txt"]),
    "two numbers in one": (spoil("res/img_1_0.txt", "1.00.000000 " + "1.000000 " * 999 + "\n"), ["img_1_0.txt"]),
    "empty": (spoil("res/img_1_0.txt", ""), ["img_1_0.txt", "0 columns"]),
    "two rows": (spoil("res/img_1_0.txt", ("1.000000 " * 1000 + "\n") * 2), ["img_1_0.txt", "2 rows"]),
    "no label": (spoil("labels.txt", "img_0.JPEG 0\n"), ["no label for 5 images: img_1"]),
    "malformed line": (spoil("labels.txt", "img_0.JPEG 0\nimg_1.JPEG ten\n"), ["labels.txt, line 2", "NAME INDEX"]),
    "label without name": (spoil("labels.txt", "img_0.JPEG 0\n7\n"), ["labels.txt, line 2: '7', must be NAME INDEX"]),
    "labels without names": (
        spoil("labels.txt", "\n7\n"),
        ["labels.txt: holds one number a line and no image names, as ILSVRC2012_validation_ground_truth.txt does"],
    ),
    "two labels": (
        spoil("labels.txt", "img_0.JPEG 0\nimg_0.JPEG 3\n"),
        ["labels.txt, line 2", "img_0.JPEG again with label 3 (line 1: 0)"],
    ),
    "label too high": (
        spoil("labels.txt", "".join(f"img_{i}.JPEG {1000 * (i > 4)}\n" for i in range(6))),
        ["label 1000"],
    ),
    "no labels": (spoil("labels.txt", "\n"), ["labels.txt: no labels"]),
    "no label file": (spoil("labels.txt", None), ["--anno-file", "labels.txt"]),
    "two kinds": (spoil("res/img_1_0.npy", np.zeros(1000)), [".npy and .txt"]),
    "second output": (spoil("res/img_1_1.txt", ""), ["img_1_1.txt", "NAME_0.txt"]),
    "torn summary": (spoil("res_summary.json", "{"), ["res_summary.json", "not a summary"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path):
    arguments = results(tmp_path, 1000, "txt")
    change, words = BAD[name]
    change(tmp_path)
    fails(run_script(SCRIPT, *arguments), *words)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("bin", np.zeros(999, np.float32), ["999 columns"]),
        ("bin", np.full(1000, np.nan, np.float32), ["NaN"]),
        ("npy", np.zeros((2, 1000), np.float32), ["shape (2, 1000)"]),
        ("npy", np.zeros((1, 999), np.float32), ["999 columns"]),
    ],
)
def test_bad_binary_results(kind, content, words, tmp_path):
    arguments = results(tmp_path, 1000, kind)
    spoil(f"res/img_1_0.{kind}", content)(tmp_path)
    fails(run_script(SCRIPT, *arguments), "img_1_0", *words)


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "labels.txt").write_text("a.JPEG 1\n")
    (tmp_path / "res").mkdir()
    arguments = ["--anno_file", tmp_path / "labels.txt", "--metrics_json", tmp_path / "m.json"]
    fails(run_script(SCRIPT, "--infer_results", tmp_path / "res", *arguments), "no .txt, .npy or .bin results")
    fails(run_script(SCRIPT, "--infer_results", tmp_path / "x", *arguments), "is not a folder")
    fails(run_script(SCRIPT, *arguments), "--infer-results: missing")
