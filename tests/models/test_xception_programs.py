"""Xception's programs and launchers end to end, on small generated photographs, with one thread."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT, fill_closed_form, run_program, user_error

from common.errors import UserError
from common.weights import mindspore
from common.weights.load import read_checkpoint
from xception.src.config import SPEC, XceptionConfig
from xception.src.program import XceptionProgram

SCRIPTS = ROOT / "xception" / "scripts"
SIZE = 71
TINY = ["--image-size", str(SIZE), "--batch_size", "4", "--workers", "0", "--threads", "1", "--lr_max", "0.01"]


def write_photos(folder, per_class, classes=("ants", "bees"), seed=0):
    """Class folders of small photographs that differ from class to class; odd sizes, one of them gray."""
    draw = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = draw.integers(0, 120, (90 + i, 101, 3), np.uint8) + np.uint8(110 * label)
            image = Image.fromarray(pixels).convert("L" if i == 0 else "RGB")
            image.save(folder / name / f"{name}_{i}.jpg")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a blank in its name that holds data/train (12 images) and data/val (7)."""
    home = tmp_path_factory.mktemp("a home")
    write_photos(home / "data" / "train", 6)
    write_photos(home / "data" / "val", 3, seed=1)
    Image.new("RGB", (80, 80), (200, 10, 10)).save(home / "data" / "val" / "bees" / "bees_x.png")
    return home


def script(name, *words, cwd, status=0):
    return run_program("sh", SCRIPTS / name, *words, cwd=cwd, check=status)


def program(name, *words, cwd, status=0):
    return run_program(ROOT / "xception" / name, *words, cwd=cwd, check=status)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(home):
    """Two epochs of three steps through the GPU script on the CPU, from a folder of its own with a relative path."""
    cwd = home / "fp32"
    cwd.mkdir()
    done = script(
        "run_train_gpu_fp32.sh",
        1,
        "../data/train",
        "--",
        "--device_target",
        "CPU",
        *TINY,
        "--epoch_size",
        2,
        "--num_classes",
        2,
        cwd=cwd,
    )
    return cwd, done.stdout


def test_the_documented_lines_are_printed_and_logged(trained):
    cwd, output = trained
    lines = output.splitlines()
    pattern = re.compile(
        r"epoch: (\d+) step: 3, loss is \d+\.\d+\n"
        r"epoch time: \d+\.\d{3} ms, per step time: \d+\.\d{3} ms"
    )
    assert [match[1] for match in pattern.finditer(output)] == ["1", "2"]
    assert lines[-1] == "train success"
    assert (cwd / "log_gpu.txt").read_text().splitlines() == lines


def test_checkpoints_have_the_documented_names(trained):
    cwd, _ = trained
    assert sorted(path.name for path in (cwd / "gpu-ckpt").iterdir()) == [
        "Xception-rank0-1_3.ckpt",
        "Xception-rank0-2_3.ckpt",
    ]
    loaded = read_checkpoint(cwd / "gpu-ckpt" / "Xception-rank0-2_3.ckpt", SPEC)
    assert loaded.build_options == {"num_classes": 2, "dropout": 0.5, "pool_padding": "same", "bn_eps": 1e-5}
    assert loaded.metadata["epoch"] == 2
    config = json.loads((cwd / "output" / "run_train_gpu_fp32" / "00000" / "config.json").read_text())
    assert (config["recipe"], config["amp"], config["batch_size"]) == ("GPU", False, 4)


def test_a_resumed_run_equals_the_uninterrupted_one(trained, home):
    """Epoch numbers, momentum and bits are the same; its checkpoints continue the names of the first run."""
    cwd = home / "resumed"
    (cwd / "gpu-ckpt").mkdir(parents=True)
    first = cwd / "gpu-ckpt" / "Xception-rank0-1_3.ckpt"
    first.write_bytes((trained[0] / "gpu-ckpt" / first.name).read_bytes())
    done = script(
        "run_train_gpu_fp32.sh",
        1,
        home / "data/train",
        f"--resume=gpu-ckpt/{first.name}",
        "--device=cpu",
        "--",
        *TINY,
        "--epoch_size",
        2,
        cwd=cwd,
    )
    assert "epoch: 2 step: 3, loss is" in done.stdout
    assert "epoch: 1 step" not in done.stdout
    last = "Xception-rank0-2_3.ckpt"
    resumed, whole = (torch.load(folder / "gpu-ckpt" / last) for folder in (cwd, trained[0]))
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    momentum = [state["momentum_buffer"] for state in whole["optimizer"]["state"].values()]
    assert len(momentum) == len(list(SPEC.build().parameters()))
    for a, b in zip(momentum, resumed["optimizer"]["state"].values(), strict=True):
        assert torch.equal(a, b["momentum_buffer"])


def test_the_ascend_script_trains_on_two_ranks(home):
    """Per-device batches: two ranks of 3 images take 12 images in two steps; RANK_TABLE_FILE may be missing."""
    cwd = home / "distributed"
    cwd.mkdir()
    done = script(
        "run_distribute_train.sh",
        "no_table.json",
        "../data/train",
        "--devices=2",
        "--device=cpu",
        "--",
        *TINY,
        "--batch_size",
        3,
        "--epoch_size",
        1,
        "--eval_path",
        "../data/val",
        cwd=cwd,
    )
    assert "RANK_TABLE_FILE: no_table.json not found; the ranks find each other without it" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "lr_decay_mode: 'liner' is read as 'linear'"
    assert "2 rank(s) on cpu" in lines[1]
    assert [line.replace(str(home), "home") for line in lines if line.startswith("note: ")] == [
        "note: --num-classes is 1000, but home/data/train has 2 class folders: 998 outputs have no images; "
        "give --num-classes=2 to train one output per folder"
    ]
    assert any(line.startswith("epoch: 1 step: 2, loss is ") for line in lines)
    result = next(line for line in lines if line.startswith("result: "))
    assert re.fullmatch(r"result: \{'Loss': \d.*, 'Top_1_Acc': 0\.\d+, 'Top_5_Acc': (0\.\d+|1\.0)\}", result)
    assert [path.name for path in (cwd / "ckpt_0").iterdir()] == ["Xception-rank0-1_2.ckpt"]
    assert (cwd / "log.txt").read_text().splitlines() == lines
    assert torch.load(cwd / "ckpt_0" / "Xception-rank0-1_2.ckpt")["build"]["num_classes"] == 1000


def test_training_goes_on_from_a_mindspore_checkpoint(home):
    """PRETRAINED_CKPT_PATH takes MindSpore's weights; --finish_epoch is the number of epochs that they were trained."""
    cwd = home / "mindspore"
    cwd.mkdir()
    state = SPEC.build().state_dict()
    fill_closed_form(state)
    mindspore.write(cwd / "official.ckpt", state)
    done = script(
        "run_train_gpu_fp16.sh",
        1,
        "../data/train",
        "official.ckpt",
        "--device=cpu",
        "--",
        *TINY,
        "--finish_epoch",
        4,
        "--epoch_size",
        5,
        "--num_classes",
        2,
        "--max-steps",
        13,
        cwd=cwd,
    )
    assert "--pretrained: fc has 1000 classes, not 2; initialized anew" in done.stdout
    assert "epoch: 5 step: 1, loss is" not in done.stdout  # one line per 100 steps and at the end of an epoch
    config = json.loads((cwd / "output" / "run_train_gpu_fp16" / "00000" / "config.json").read_text())
    assert (config["finish_epoch"], config["amp"]) == (4, True)
    newest = torch.load(cwd / "output" / "run_train_gpu_fp16" / "00000" / "checkpoint.pth.tar")
    assert (newest["epoch"], newest["step"]) == (4, 1)


def test_training_keeps_the_padding_of_its_initial_weights(home):
    """timm's weights need padding 1; without weights the padding is MindSpore's."""
    torch.save(SPEC.build(num_classes=2).state_dict(), home / "timm.pth")
    program = XceptionProgram("")
    for pretrained, phase in ((home / "timm.pth", "torch"), ("", "same")):
        arguments = ["--device_target=CPU", f"--dataset_path={home}/data/train", "--batch_size=4", "--num_classes=2"]
        job = program.prepare(*program.parse([*arguments, f"--pretrained={pretrained}"]))
        assert job.build_options["pool_padding"] == phase


# ---- evaluation and deployment ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expressive(trained, home):
    """The trained network with closed-form weights, so that its classes are not all the same."""
    content = torch.load(trained[0] / "gpu-ckpt" / "Xception-rank0-2_3.ckpt")
    fill_closed_form(content["state_dict"])
    file = home / "expressive.ckpt"
    torch.save(content, file)
    return file


@pytest.fixture(scope="module")
def evaluated(expressive, home):
    """What run_eval_gpu.sh printed, and the folder with its log."""
    cwd = home / "evaluated"
    cwd.mkdir()
    done = script(
        "run_eval_gpu.sh", 0, "../data/val", "../expressive.ckpt", "--device=cpu", "--", "--workers=0", cwd=cwd
    )
    return cwd, done.stdout


def test_every_image_is_counted(evaluated):
    cwd, output = evaluated
    assert "7 images" in output
    line = output.splitlines()[-1]
    assert (cwd / "eval_gpu.log").read_text().splitlines() == [line]
    result = dict(re.findall(r"'(\w+)': ([\d.]+)", line))
    assert round(float(result["Top_1_Acc"]) * 7) in range(1, 7)  # neither all nor none, or this would prove nothing
    assert result["Top_5_Acc"] == "1.0"


def test_the_exported_chain_equals_the_evaluation_to_the_image(evaluated, expressive, home):
    cwd = home / "chain"
    (cwd / "flat").mkdir(parents=True)
    labels = []
    for label, name in enumerate(("ants", "bees")):
        for path in sorted((home / "data" / "val" / name).iterdir()):
            (cwd / "flat" / path.name).write_bytes(path.read_bytes())
            labels.append(f"{path.name} {label}")
    (cwd / "val_label.txt").write_text("\n".join(labels) + "\n")
    done = program(
        "export.py",
        "--ckpt_file",
        expressive,
        "--file_name",
        "xception",
        "--file_format",
        "ONNX",
        "--width",
        SIZE,
        "--height",
        SIZE,
        "--device_target",
        "GPU",
        cwd=cwd,
    )
    assert "TracerWarning" not in done.stderr
    program("preprocess.py", "--src_path", "flat", "--save_path", "bins", "--image-size", SIZE, "--workers", 1, cwd=cwd)
    run_program(
        ROOT / "tools" / "run_onnx.py",
        "--model",
        "xception.onnx",
        "--input",
        "bins",
        "--output",
        ".",
        "--output_dirname",
        "results",
        "--outfmt",
        "NPY",
        "--batchsize",
        2,
        cwd=cwd,
    )
    program(
        "postprocess.py",
        "--infer_results",
        "results",
        "--anno_file",
        "val_label.txt",
        "--num-classes",
        2,
        "--metrics_json",
        "metrics.json",
        "--workers",
        1,
        cwd=cwd,
    )
    values = {pair["key"]: pair["value"] for pair in json.loads((cwd / "metrics.json").read_text())["value"]}
    assert values["Number of images"] == "7"
    top1 = float(re.search(r"'Top_1_Acc': ([\d.]+)", evaluated[1])[1])
    assert values["Top1 accuracy"] == f"{100 * top1:.2f}%"


def test_demo_names_classes_with_the_newest_checkpoint(trained, home):
    done = program("demo.py", home / "data" / "val" / "ants" / "ants_1.jpg", "--device", "cpu", cwd=trained[0])
    assert re.search(r"\d+\.\d\d %  (ants|bees)\n", done.stdout)


# ---- launchers -------------------------------------------------------------------------------------------------------


ASCEND = dict(  # the columns of the package's README, and the constants of its programs
    recipe="Ascend", num_classes=1000, batch_size=128, loss_scale="1024", momentum=0.9, weight_decay=1e-4, epochs=250,
    save_checkpoint=True, save_checkpoint_epochs=1, keep_checkpoint_max=5, save_checkpoint_path="./", warm_up_epochs=1,
    lr_schedule="liner", use_label_smooth=True, finish_epoch=0, label_smoothing=0.1, lr_init=4e-5, lr=0.4, lr_end=4e-5,
    color_jitter=0.4, smoothing_targets="others", decay_norm=False, amp=True, seed=1,
)  # fmt: skip
GPU = dict(ASCEND, recipe="GPU", batch_size=64, save_checkpoint_path="./gpu-ckpt", lr_schedule="linear", device="cuda")


@pytest.mark.parametrize(
    ("name", "words", "ranks", "options"),
    [
        ("run_standalone_train.sh", [5, "d"], "", dict(ASCEND, device="npu", device_id=5)),
        ("run_distribute_train.sh", ["t", "d"], "[8 ranks] ", dict(ASCEND, device="npu", is_distributed=True)),
        ("run_train_gpu_fp32.sh", [8, "d"], "[8 ranks] ", dict(GPU, is_fp32=True, amp=False)),
        ("run_train_gpu_fp16.sh", [1, "d", "w.ckpt"], "", dict(GPU, pretrained="w.ckpt")),
    ],
)
def test_launchers_set_every_field_of_the_configuration(name, words, ranks, options, tmp_path):
    """Every field of the configuration, down to those that nobody names."""
    done = script(name, *words, "--dry_run=true", "--", "--momentum=0.8", cwd=tmp_path)
    start, _, end = done.stdout.strip().partition("train.py ")
    assert start.startswith(ranks) and (ranks or not start.startswith("["))
    expected = XceptionConfig(**options | dict(data="d", run_name=name.removesuffix(".sh"), momentum=0.8))
    assert XceptionProgram("").parse(end.split())[0] == expected


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "run_standalone_train.sh",
            [0],
            "DATA_PATH: missing; usage: run_standalone_train.sh DEVICE_ID DATA_PATH [--key=value ...] [-- options]",
        ),
        ("run_train_gpu_fp32.sh", ["two", "d"], "--devices: invalid int value: 'two'"),
        ("run_train_gpu_fp32.sh", [1, "d", "w", "x"], "x: expected --key=value"),
        ("run_eval.sh", [0, "d"], "PATH_CHECKPOINT: missing; usage: run_eval.sh"),
        ("run_train_gpu_fp16.sh", [1, "nowhere", "--device=cpu"], "--dataset-path: "),
        ("run_train_gpu_fp16.sh", [1, "nowhere", "--lr_max=3"], "--lr_max: unknown key; known are "),
    ],
)
def test_launchers_refuse_with_one_line(name, words, message, tmp_path):
    assert user_error(script(name, *words, cwd=tmp_path, status=2)).startswith(message)
    assert list(tmp_path.iterdir()) == []


CPU = ["--device_target", "CPU"]
ON_DATA = [*CPU, "--dataset_path", "DATA/train", "--batch_size", "2"]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train.py", ["--device_target", "TPU"], "--device-target: TPU, must be one of auto, Ascend, GPU, CPU"),
        ("train.py", CPU, "--dataset-path: missing"),
        ("train.py", [*CPU, "--dataset_path", "DATA"], "--dataset-path: DATA holds train, val; give DATA/train"),
        ("train.py", [*CPU, "--lr_decay_mode", "step"], "--lr-decay-mode: step, must be one of"),
        ("train.py", [*CPU, "--epoch_size", "0"], "--epoch-size: 0, must be at least 1"),
        (
            "train.py",
            [*CPU, "--epoch_size", "1", "--warmup_epochs", "2"],
            "--warmup-epochs: 2, more than --epoch-size 1",
        ),
        ("train.py", [*CPU, "--finish_epoch", "250"], "--finish-epoch: 250, must be fewer than --epoch-size 250"),
        ("train.py", [*ON_DATA, "--finish_epoch", "3"], "--finish-epoch: 3, needs the weights to go on with"),
        ("train.py", [*ON_DATA, "--pretrained", "SLICE"], "SLICE: does not fit xception, "),
        ("train.py", [*CPU, "--image-size", "70"], "--image-size: 70 pixels, xception takes 71 and more"),
        ("eval.py", [*CPU, "--checkpoint_path", "SLICE"], "--dataset-path: missing"),
        ("eval.py", [*CPU, "--dataset_path", "DATA/val", "--checkpoint_path", "SLICE"], "SLICE: does not fit xception"),
        ("export.py", ["--ckpt_file", "SLICE", "--width", "70"], "--width: 70 pixels, xception takes 71 and more"),
        ("export.py", ["--width", "80", "--height", "90"], "--height: 90, must equal --width 80"),
        ("export.py", ["--file_format", "MINDIR"], "--file-format: MINDIR can only be written by MindSpore"),
        ("export.py", ["--file_format", "OM"], "--file-format: OM, must be one of ONNX, AIR, MINDIR"),
        ("export.py", [], "no Xception-rank0-EPOCH_STEP.ckpt in ./ckpt_0 or ./gpu-ckpt"),
    ],
)
def test_programs_refuse_with_one_line(home, name, words, message, tmp_path):
    places = {"DATA": str(home / "data"), "SLICE": str(ROOT / "tests" / "fixtures" / "mindspore_slice.ckpt")}

    def placed(text):
        return re.sub("DATA|SLICE", lambda match: places[match[0]], text)

    done = program(name, *map(placed, words), cwd=tmp_path, status=2)
    assert user_error(done).startswith(placed(message))


@pytest.mark.parametrize("name", ["train.py", "eval.py", "export.py", "demo.py", "preprocess.py", "postprocess.py"])
def test_help_shows_the_documented_options(name, tmp_path):
    promised = {
        "train.py": "device-target dataset-path is-distributed is-fp32 resume epoch-size lr-max lr-init lr-end "
        "warmup-epochs lr-decay-mode finish-epoch keep-checkpoint-max label-smooth-factor num-classes "
        "batch-size momentum weight-decay loss-scale use-label-smooth save-checkpoint-path",
        "eval.py": "device-target device-id checkpoint-path dataset-path",
        "export.py": "ckpt-file file-name file-format width height device-target",
    }
    output = program(name, "--help", cwd=tmp_path).stdout
    for flag in promised.get(name, "").split():
        assert re.search(rf"--(no-)?{flag}\b", output), flag


@pytest.mark.realdata
def test_real_photographs(tmp_path, ants_bees):
    done = script(
        "run_train_gpu_fp32.sh",
        1,
        ants_bees / "train",
        "--device=cpu",
        "--",
        *TINY,
        "--batch_size",
        16,
        "--workers",
        1,
        "--epoch_size",
        1,
        cwd=tmp_path,
    )
    assert "epoch: 1 step: 5, loss is " in done.stdout
    done = script(
        "run_eval_gpu.sh",
        0,
        ants_bees / "val",
        "gpu-ckpt/Xception-rank0-1_5.ckpt",
        "--device=cpu",
        "--threads=1",
        cwd=tmp_path,
    )
    assert "52 images" in done.stdout


def test_user_errors_of_the_program_are_raised_before_any_process(tmp_path):
    with pytest.raises(UserError, match="--dataset-path"):
        XceptionProgram("").check(["--device_target", "CPU", "--dataset_path", str(tmp_path / "none")])
