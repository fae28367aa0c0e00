"""The command lines people rely on: flags, spellings, launchers' commands, speed of --help."""

import dataclasses
import re
import shlex
import sys

import pytest
from support import ROOT, user_error

from common import cli
from common.config import TrainConfig
from common.errors import UserError
from inception_v3 import train

V3 = ROOT / "inception_v3"

# Adding a flag is fine and belongs here; renaming or removing one breaks somebody's script.
TRAIN_FLAGS = """
accumulate amp amp-backend amp-dtype arch auto-augment batch-size bce bce-target-thresh cache-features clip-grad
color-jitter combine-grad compile cutmix decoder
data decay-norm device device-id dropout ema epochs eval-batch-size eval-size evaluate exclude freeze freeze-norm
full-fp32 hang-timeout head-init head-lr-scale image-size
keep-best keep-last label-numbers lr-find
label-smoothing loss-scale lr lr-schedule machines max-steps memory-format min-crop mixup momentum
npu num-classes on-bad-image on-save-error opt-level optimizer output-dir pool-padding predictions pretrained print-freq
random-erasing recipe reduce repeated-aug
rendezvous-timeout resume run-name save-every seed smoothing-targets threads throughput-skip-steps
tensorboard train-crop transform-input use-ema
warm-up-epochs
weight-decay workers
""".split()


def test_the_flags_of_training_are_frozen():
    assert sorted(cli.flag_of(field)[2:] for field in dataclasses.fields(TrainConfig)) == sorted(TRAIN_FLAGS)


def parse(*argv):
    return cli.parse(TrainConfig(), "", argv, require=False)[0]


def test_every_flag_of_the_document_is_taken():
    config = parse(
        *"-a inception_v3 --data D -j 4 --output_dir O -b 64 --lr 0.1 --print-freq 5 --epochs 3 "
        "--label-smoothing 0.2 --wd 1e-3 -p 7 --amp --npu 2".split()
    )
    assert (config.arch, config.data, config.workers, config.output_dir, config.batch_size) == (
        "inception_v3",
        "D",
        4,
        "O",
        64,
    )
    assert (config.lr, config.print_freq, config.epochs, config.label_smoothing) == (0.1, 5, 3, 0.2)
    assert (config.weight_decay, config.num_classes, config.amp) == (1e-3, 7, True)
    assert (config.device_kind, config.device_index) == ("npu", 2)


def test_underscores_and_dashes_are_the_same_and_values_keep_theirs():
    assert (
        parse("--print_freq=3", "--output_dir", "a_b-c").output_dir
        == parse("--print-freq", "3", "--output-dir=a_b-c").output_dir
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr=fast"], "--lr: invalid float value: 'fast'"),
        (["--lr=0"], "--lr: 0.0, must be above 0"),
        (["--epoch=3"], "--epoch=3: unknown option; did you mean --epochs?"),
        (["--device=tpu"], "--device: tpu, must be one of auto, npu, cuda, cpu"),
        (["--label-smoothing=1.5"], "--label-smoothing: 1.5, must be at least 0 and at most 1"),
        (["--loss-scale=much"], "--loss-scale: much, must be a positive number or dynamic"),
        (["--npu=0", "--device=cpu"], "--npu: contradicts --device cpu; give one of them"),
        (["--optimizer=adamw", "--momentum=1"], "--momentum: 1.0, must be below 1 with --optimizer adamw"),
        (["--opt-level=O1"], "--opt-level: O1 is of apex; add --amp-backend apex, or leave it out"),
        (["--combine-grad"], "--combine-grad: is of apex; add --amp-backend apex, or leave it out"),
        (["--amp-backend=apex"], "--amp-backend: apex, needs --amp"),
        (["--amp", "--amp-backend=apex", "--ema=0.9"], "--ema: works with float32 weights, apex may replace them"),
        (["--amp", "--amp-backend=apex", "--amp-dtype=bf16"], "--amp-dtype: bf16, but apex supports fp16 only"),
        (["--evaluate"], "--evaluate: needs --resume FILE or --pretrained FILE"),
        (
            ["--train-crop=center", "--min-crop=0.5"],
            "--min-crop: 0.5, has no effect with --train-crop center; leave it out",
        ),
        (["--warm-up-epochs=6", "--epochs=5"], "--warm-up-epochs: 6, must be fewer than --epochs 5"),
    ],
)
def test_mistakes_name_the_flag_what_was_given_and_what_is_allowed(argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert str(error.value).startswith(message)


FULL_1P = dict(
    batch_size=256, epochs=240, lr=0.045, weight_decay=2e-4, label_smoothing=0.1, amp=True, loss_scale="1024",
    workers=32, print_freq=100,
)  # fmt: skip
FULL_8P = dict(
    batch_size=2048, epochs=240, lr=1.2, weight_decay=1e-4, label_smoothing=0.1, amp=True, loss_scale="128", seed=49,
    workers=128, print_freq=30,
)  # fmt: skip
PERFORMANCE_8P = dict(FULL_8P, epochs=1, lr=0.045)
LAUNCHERS = {  # launcher: recipe, ranks, options that differ from TrainConfig's defaults, as the document has them
    "train_full_1p": ("full_1p", 1, FULL_1P),
    "train_performance_1p": ("performance_1p", 1, dict(FULL_1P, epochs=1, print_freq=10)),
    "train_full_8p": ("full_8p", 8, FULL_8P),
    "train_performance_8p": ("performance_8p", 8, PERFORMANCE_8P),
    "train_performance_multinodes": ("performance_8p", 8, PERFORMANCE_8P),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_is_its_recipe(run, name):
    """Every field of the configuration, down to those that nobody names."""
    done = run(V3 / "test" / f"{name}.sh", "--data_path=/data/a b", "--dry_run=true", "--", "--max-steps=3")
    recipe, ranks, options = LAUNCHERS[name]
    assert done.stdout.startswith("[8 ranks] ") == (ranks == 8)
    words = shlex.split(done.stdout.removeprefix("[8 ranks] "))
    assert words[1] == str(V3 / "train.py") and words[-1] == "--max-steps=3"
    expected = TrainConfig(recipe=recipe, data="/data/a b", run_name=name, max_steps=3, **options)
    assert train.PROGRAM.parse(words[2:])[0] == expected


def test_the_defaults_of_train_py_are_the_one_device_recipe_without_mixed_precision():
    config, explicit = train.PROGRAM.parse(["--data=D"])
    assert config == TrainConfig(data="D", batch_size=256, epochs=240, lr=0.045, weight_decay=2e-4, loss_scale="1024")
    assert explicit == {"data"}


def test_help_lists_the_recipes_with_hardware_and_accuracy_and_shows_the_defaults_of_the_one_named(run):
    printed = run(V3 / "train.py", "--recipe=full_8p", "--help").stdout
    assert re.search(r"full_8p +8 NPUs +top-1 78.12 %, 6823 images/s \(reported\)", printed)
    assert "[at least 1, or auto; default 2048]" in printed


def test_an_unknown_recipe_is_an_error_that_lists_the_known(run):
    message = user_error(run(V3 / "train.py", "--recipe=full", check=2))
    known = "default, full_1p, full_8p, performance_1p, performance_8p, quickstart, modern, finetune, probe"
    assert message == f"--recipe: full, must be one of {known}"


def test_the_users_keys_win_over_the_recipe_and_old_spellings_work(run):
    printed = run(
        V3 / "test" / "train_full_8p.sh",
        "--data_path=D",
        "--train_epochs=7",
        "--devices=2",
        "--device=cpu",
        "--dry_run=true",
    ).stdout
    assert printed.startswith("[2 ranks] ") and "--epochs=7" in printed and "--device=cpu" in printed


@pytest.mark.parametrize(
    "script",
    [
        "inception_v3/train.py",
        "inception_v3/eval.py",
        "inception_v3/demo.py",
        "inception_v3/pthtar2onnx.py",
        "tools/make_sample_data.py",
    ],
)
def test_help_imports_no_torch_and_shows_ranges_and_defaults(run, script):
    done = run(sys.executable, "-X", "importtime", ROOT / script, "--help")
    imported, text = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}, done.stdout
    assert "common.cli" in imported and not imported & {"torch", "torchvision", "onnx", "onnxruntime"}
    assert f"python {script}" in text
    if script.endswith("train.py"):
        assert "images per step of one machine, over all its devices [at least 1, or auto;" in " ".join(text.split())


HELP_OF_ALL = """
import contextlib, io, runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    if slow := sys.modules.keys() & {"torch", "torchvision", "onnx", "onnxruntime"}:
        sys.exit(f"{script} --help imports {slow}")
"""


def test_no_script_imports_torch_for_its_help(run):
    folders = (ROOT / folder for folder in ("inception_v3", "inception_v4", "xception", "tools"))
    scripts = [path for folder in folders for path in folder.glob("*.py") if "__main__" in path.read_text()]
    assert len(scripts) > 20
    run(sys.executable, "-c", HELP_OF_ALL, *scripts)


@pytest.mark.parametrize("words", [["--data=nowhere"], ["--batch-size=0"], ["--data=IMAGES", "--batch-size=64"]])
def test_mistakes_answer_before_torch_is_imported(run, images, words):
    words = [word.replace("IMAGES", str(images)) for word in words]
    code = f"""
import sys, tiny
try:
    tiny.PROGRAM.main({words})
except SystemExit as end:
    print(end, 'torch' in sys.modules)"""
    done = run(sys.executable, "-c", code, env={"PYTHONPATH": str(ROOT / "tests")})
    assert done.stdout == "2 False\n" and done.stderr.startswith("error: --")


PROGRAM = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom common import cli\nwith cli.exit_on_error():\n    "


@pytest.mark.parametrize("body", ["print('lost')", "print('lost', flush=True)", "print('lost'); sys.exit(0)"])
@pytest.mark.parametrize(
    ("target", "status", "error"),
    [("/dev/full", 1, "error: standard output: No space left on device\n"), ("&-", 0, ""), ("/dev/null", 0, "")],
)
def test_output_that_is_lost_is_a_failure_unless_it_was_closed(run, tmp_path, target, status, error, body):
    (tmp_path / "program.py").write_text(PROGRAM + body)
    done = run("bash", "-c", f'exec "$0" program.py >{target}', sys.executable, check=None)
    assert (done.returncode, done.stderr) == (status, error)


def test_a_pipe_that_nobody_reads_ends_a_program_without_a_word(run, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM + "while True: print('more')")
    done = run("bash", "-c", '"$0" program.py | head -1; exit ${PIPESTATUS[0]}', sys.executable, check=1)
    assert (done.stdout, done.stderr) == ("more\n", "")
