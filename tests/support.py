"""Support for the tests: paths, inputs, starting programs, processes and signals, comparing runs.

Importing it takes numpy only: fixtures/mindspore_peer.py uses it in an environment without torch and PIL.
"""

import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
REAL_DATA = ROOT.parent / "shared" / "data"
FAKE_BIN = TESTS / "fake_bin"
FAKE_NPU = TESTS / "fake_npu"
TINY = TESTS / "tiny.py"
# The launcher's keys follow, then -- and options of the training program.
LAUNCH_TINY = [ROOT / "common" / "launch" / "launch.py", "tiny", TINY, "--", "--"]
SIZE = 75  # the smallest input of Inception v3 and v4: a forward pass of 15 ms


# ---- images ------------------------------------------------------------------------------------------------------


def draw_images(folder, classes, per_class, size=40, seed=0):
    """JPEGs whose class shows as a brightness and a stripe width; names sort in drawing order."""
    from PIL import Image

    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            rng = np.random.default_rng((seed, label, number))
            stripes = (np.arange(size) // (2 + 2 * label)) % 2 * 120
            pixels = rng.integers(0, 100, (size, size + number % 3, 3)) + stripes[:, None, None]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:04d}.jpg", quality=90)


def plain_pixels(path, size=SIZE):
    """Second implementation of the published transform: resize to 342/299 of `size`, floor offsets -> uint8 HWC."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    short = round(342 * size / 299)
    width, height = image.size
    if min(width, height) != short:
        scaled = int(short * max(width, height) / min(width, height))
        image = image.resize((short, scaled) if width <= height else (scaled, short), Image.BILINEAR)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def plain_input(path, size=SIZE):
    """float32 CHW of one image, (x/255 - 0.5) / 0.5."""
    pixels = plain_pixels(path, size).astype(np.float32)
    half = np.float32(0.5)
    return ((pixels / np.float32(255) - half) / half).transpose(2, 0, 1)


# ---- weights -----------------------------------------------------------------------------------------------------


def closed_form_array(name, shape, low=-1.0, high=1.0):
    """float32 array of `shape`, uniform over [low, high): an integer hash of the name and the position.

    Golden values computed from it do not depend on a random number generator.
    """
    seed = sum((i + 1) * byte for i, byte in enumerate(name.encode()))
    value = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.uint64) * np.uint64(0x9E3779B1) + np.uint64(seed)
    for shift, factor in ((15, 0x85EBCA77), (13, 0xC2B2AE3D)):
        value &= np.uint64(0xFFFFFFFF)
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    value = (value & np.uint64(0xFFFFFFFF)) ^ ((value & np.uint64(0xFFFFFFFF)) >> np.uint64(16))
    return (low + (high - low) * (value / 2.0**32)).astype(np.float32).reshape(shape)


def closed_form_weight(name, shape):
    """A weight under torch's name and shape that keeps the scale of activations: kernels ~ fan-in ** -0.5."""
    last = name.rpartition(".")[2]
    if last == "weight" and len(shape) > 1:
        bound = (4.2 / np.prod(shape[1:])) ** 0.5
        return closed_form_array(name, shape, -bound, bound)
    if last == "weight":
        return closed_form_array(name, shape, 0.7, 1.0)
    if last == "running_var":
        return closed_form_array(name, shape, 0.5, 2.0)
    return closed_form_array(name, shape, -0.1, 0.1)


def fill_closed_form(state_dict):
    """Overwrite every tensor of a torch state dict in place, batch counters excepted."""
    import torch

    for name, value in state_dict.items():
        if value.is_floating_point():
            value.copy_(torch.from_numpy(closed_form_weight(name, tuple(value.shape))))


def closed_form_image(size):
    """float32 [1, 3, size, size] in [-1, 1): a smooth image with some texture."""
    y, x = np.mgrid[0:size, 0:size] / size
    planes = [0.6 * np.sin((4 + c) * x + 3 * c) * np.cos((5 - c) * y) for c in range(3)]
    return (np.stack(planes)[None] + 0.3 * closed_form_array("image", (1, 3, size, size))).astype(np.float32)


def imagenet_normalized(images_NCHW):
    """Images in [-1, 1] as programs that normalize with ImageNet's mean and standard deviation see them."""
    import torch

    from common.spec import IMAGENET

    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in IMAGENET)
    return ((images_NCHW + 1) / 2 - mean) / std


def calibrated(num_classes, inputs_NCHW, spec=None):
    """A network with random weights whose logits differ from image to image without amplifying rounding errors.

    With batch-norm statistics of the images alone, the last bit of a pixel moves logits by 1 %. Widening the small
    variances damps that; centering the logits restores the differences between images.

    Args:
      spec: default: Inception v4.
    """
    import torch

    if spec is None:
        from inception_v4.spec import SPEC as spec

    torch.manual_seed(num_classes)
    options = {**({"aux": False} if spec.aux_weight else {}), **spec.format_options.get("state_dict", {})}
    model, images = spec.build(num_classes=num_classes, dropout=0.0, **options), torch.from_numpy(inputs_NCHW)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        for norm in norms if spec.aux_weight else ():
            norm.weight.mul_(1.01)  # weights of exactly 1 are taken for those of TensorFlow's Inception v3
        model.train()(images)
        for norm in norms:
            norm.running_var.clamp_(min=float(norm.running_var.mean()) * 1.4)
        logits = model.eval()(images)
        scale = 3 / (logits - logits.mean(0)).std()
        last = model.get_submodule(spec.classifiers[0])
        last.weight.mul_(scale)
        last.bias.sub_(logits.mean(0)).mul_(scale)
    return model


def labels_at_ranks(logits_NK, background):
    """A class for each image that lies at rank 1, 2, .. 6, 1, .. of its row, clear of its neighbors.

    Returns:
      (labels counted from 0 without the background column, expected hits at top-1..top-5).
    """
    labels, hits = [], np.zeros(5, int)
    for i, row in enumerate(logits_NK):
        order = np.argsort(-row, kind="stable")
        rank = i % 6
        while order[rank] < background or min(abs(np.diff(row[order[max(0, rank - 1) : rank + 2]]))) < 2e-2:
            rank += 1  # the background class, or so close to the next score that another engine may swap them
        labels.append(int(order[rank]) - background)
        hits += np.arange(1, 6) > rank
    return labels, hits


def write_pooling_onnx(path, opset=11, name="image", shape=("N", 3, SIZE, SIZE), inputs=1, extra=(), dtype="float32"):
    """An ONNX file of one pooling layer; the arguments make it one that atc refuses, or one of another input type."""
    import onnx
    from onnx import TensorProto, helper

    names = [name, *(f"other{i}" for i in range(inputs - 1))]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [name], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("GlobalAveragePool", ["numbers"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["class"]),
            *extra,
        ],
        "net",
        [helper.make_tensor_value_info(each, kind, list(shape)) for each in names],
        [helper.make_tensor_value_info("class", TensorProto.FLOAT, [shape[0], 3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6), path)
    return path


# ---- starting programs -------------------------------------------------------------------------------------------

# Importing torch takes longer than most programs of the tests: one process imports it and forks for each program.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "torch._dynamo", "torchvision"])


def _as_main(words, cwd, env, outputs):
    """What the interpreter does with `python WORDS`."""
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # the default method of a program started alone
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:1] = [os.path.dirname(words[0]), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def forked(words, cwd, env, timeout):
    """subprocess.run of a Python program, its output captured, in a process that has torch loaded."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
        process = _FORKS.Process(target=_as_main, args=(words, cwd, env, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in outputs))


def run_program(*words, cwd=None, env=None, check=0, timeout=600, fork=True):
    """Run a program as a user does and capture its output.

    Args:
      words: command; a first word that ends in .py or .sh runs in this Python or in bash.
      env: variables to set in addition to this process's.
      check: exit status to assert, or None.
      fork: fork a Python program from a process that has torch loaded; False where the start itself is tested.
    """
    words = [str(word) for word in words]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **(env or {})}
    if fork and words[0].endswith(".py"):
        done = forked(words, cwd or os.getcwd(), environment, timeout)
    else:
        interpreter = {".py": [sys.executable], ".sh": ["bash"]}.get(pathlib.Path(words[0]).suffix, [])
        done = subprocess.run(
            [*interpreter, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment
        )
    assert check is None or done.returncode == check, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_script(script, *arguments, env=None, cwd=None):
    """Run a script of the repository, whatever its exit status."""
    return run_program(ROOT / script, *arguments, cwd=cwd, env=env, check=None)


def run_ok(script, *arguments, **more):
    """Standard output of a script of the repository that must succeed."""
    done = run_script(script, *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def user_error(done):
    """The one line `error: ...` on stderr of a user's mistake, without that word; no traceback, nothing else."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0][len("error: ") :]


def fails(done, *words):
    """Assert exit status 2 and one line `error: ...` with these words."""
    message = user_error(done)
    assert done.returncode == 2, done.stdout + done.stderr
    for word in words:
        assert word in message, message


def hits_printed(output):
    """Counts of the accuracy table that evaluation and postprocessing print."""
    return [int(line.split("(")[1].split()[0]) for line in output.splitlines() if line.startswith("top")]


# ---- stand-ins of Ascend software ---------------------------------------------------------------------------------


NPU_SMI_310P = """
+-------------------+-----------------+------------------------------------------------------+
| npu-smi 22.0.0                           Version: 22.0.0                                   |
| NPU     Name      | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device    | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===================+=================+======================================================+
| 0       310P3     | OK              | 15.8         42                0    / 0              |
| 0       0         | 0000:82:00.0    | 0            1074 / 21534                            |
+===================+=================+======================================================+
| 1       310P3     | OK              | 15.4         43                0    / 0              |
| 0       1         | 0000:89:00.0    | 0            1070 / 21534                            |
+===================+=================+======================================================+
"""


FRONT_ENDS = ("2023", "strict", "typer")  # of ais_bench


def front_end_path(name):
    """PYTHONPATH with the stand-in for a front end of ais_bench."""
    return f"{FAKE_BIN / f'ais_bench_{name}'}{os.pathsep}{FAKE_BIN / 'site'}"


def npu_site(folder, version=None, packages=("torch_npu",)):
    """Make `folder` a site folder with the stand-ins: packages, metadata, the entry point that `import torch` calls.

    Args:
      version: of torch_npu; default: the installed torch's.
    """
    import torch

    for package in packages:
        (folder / package).symlink_to(FAKE_NPU / "site" / package)
    if "torch_npu" in packages:
        version = version or torch.__version__.partition("+")[0]
        info = folder / f"torch_npu-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {version}\n")
        (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def npu_environment(*site_folders, **more):
    """Variables that put site folders in front of the installed packages."""
    path = os.pathsep.join([*map(str, site_folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    # The test process disables the loading of backends by `import torch`; a user's shell does not.
    return {"PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", **more}


# ---- processes and signals ---------------------------------------------------------------------------------------


def wait_until(condition, process=None, output=lambda: "", seconds=120):
    """Return when condition() is true; fail when the time is over or the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = process is not None and process.poll() is not None
        assert not ended or condition(), f"ended with status {process.poll()} before\n{output()}"
        assert time.monotonic() < deadline, output()
        time.sleep(0.01)


def background(*words, cwd):
    """Start a program without output."""
    return subprocess.Popen(
        [str(w) for w in words],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHON": sys.executable},
    )


def metrics_of(folder):
    """Records of a run's metrics.jsonl; none before the file exists."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stopped_at(process, folder, number, after_steps):
    """Signal a running training once its metrics have `after_steps` lines; returns its exit status.

    SIGKILL waits for a checkpoint too: it is written beside the steps, and without one the run would start anew.
    """
    deadline = time.monotonic() + 120
    metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoint.pth.tar"
    while process.poll() is None and time.monotonic() < deadline:
        has_begun = metrics.exists() and len(metrics.read_text().splitlines()) >= after_steps
        if has_begun and (number != signal.SIGKILL or checkpoint.exists()):
            process.send_signal(number)
            break
        time.sleep(0.002)
    return process.wait(timeout=120)


_SLOW_FILE = """
import os
opened = os.open
def open_after_wait(path, *options, **more):
    if os.fspath(path) == {path!r} and os.path.exists({pipe!r}):
        with open({pipe!r}, "rb") as pipe:
            pipe.read()
    return opened(path, *options, **more)
os.open = open_after_wait
"""


def slow_file(path, folder):
    """(Pipe, environment): os.open of `path` waits, as on a network disk that does not answer.

    It waits in programs of that environment while the pipe exists, until somebody has opened it to write and closed it.
    The pipe is not made here. `folder` is new; its sitecustomize.py holds the code.
    """
    folder.mkdir()
    pipe = folder / "pipe"
    (folder / "sitecustomize.py").write_text(_SLOW_FILE.format(path=str(path), pipe=str(pipe)))
    return pipe, {"PYTHONPATH": str(folder)}


def pending_signals(pid):
    """Numbers of the signals that a process has been sent and has not taken yet."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return {number for number in signal.valid_signals() if any(mask >> (number - 1) & 1 for mask in masks)}


def send_delivered(pid, number):
    """Send a signal and return when the process has taken it, so that a second one does not merge with it."""
    os.kill(pid, number)
    wait_until(lambda: number not in pending_signals(pid))


def processes_naming(text):
    """Process ids whose command line holds `text`."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(text).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def all_gone(folder, seconds=60):
    """Whether no process names `folder` any more, or soon."""
    deadline = time.monotonic() + seconds
    while (found := processes_naming(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not found


# ---- comparing runs ----------------------------------------------------------------------------------------------


def final(folder):
    """The newest checkpoint of a run folder, as load_torch reads it."""
    from common.weights.load import load_torch

    return load_torch(folder / "checkpoint.pth.tar")


def differences(a, b, path=""):
    """Names of the entries in which two nested states differ in any bit."""
    import torch

    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [name for key in a for name in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list):
        return [name for n, (x, y) in enumerate(zip(a, b, strict=True)) for name in differences(x, y, f"{path}/{n}")]
    return [] if a == b else [path]


def run_differences(one, other, across_devices=False):
    """Names of the entries in which the checkpoints of two run folders differ in any bit.

    Compares weights, averages, optimizer, position and best epoch; of the optimizer only its state, without the options
    that name a kernel, where the runs were on two kinds of devices.
    """
    keys = ("state_dict", "ema_state_dict", "ema_updates", "epoch", "step", "best_acc1", "best_epoch")
    a, b = final(one), final(other)
    found = differences({key: a[key] for key in keys}, {key: b[key] for key in keys})
    if across_devices:
        return found + differences(a["optimizer"]["state"], b["optimizer"]["state"], "/optimizer/state")
    return found + differences(a["optimizer"], b["optimizer"], "/optimizer")
