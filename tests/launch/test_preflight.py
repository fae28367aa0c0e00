"""tools/check_npu.py and --preflight=true: checks that pass, checks that fail, and their remedies."""

import io
import socket
import sys

from support import LAUNCH_TINY, ROOT

from common.data import index
from common.device import finding
from common.launch import preflight

CHECK = ROOT / "tools" / "check_npu.py"


def table(done):
    """{need: (ok or FAIL, found, remedy)} of the printed table."""
    rows, last = {}, None
    for line in done.splitlines()[:-1]:
        if line.strip().startswith("-> "):
            rows[last] = (*rows[last][:2], line.strip()[3:])
        else:
            last, _, rest = line.partition("  ")
            word, _, found = rest.strip().partition(" ")
            rows[last] = (word, found.strip(), "")
    return rows


def test_a_sound_cpu_passes(run, images):
    done = run(CHECK, "--device=cpu", "--data", images)
    rows = table(done.stdout)
    assert [need for need, row in rows.items() if row[0] != "ok"] == [] and "all 9 checks passed" in done.stdout
    assert rows["data"][1] == "60 images in 3 classes, 21 for validation"
    assert "\033" not in done.stdout, "colors are for terminals"


def test_an_empty_validation_set_is_not_taken_for_none(images):
    splits = index.load_splits(str(images))
    empty = index.Splits(splits.train, splits.val.without(set(splits.val.names())))
    assert preflight._check_data(lambda: empty, "").found == "60 images in 3 classes, 0 for validation"
    assert preflight._check_data(lambda: index.Splits(splits.train, None), "").found.endswith("no validation set")


def test_what_is_wrong_comes_with_a_remedy_and_status_1(run, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        words = [
            CHECK,
            "--device=npu",
            "--devices=2",
            "--data",
            tmp_path / "data",
            f"--master-port={port}",
            "--batch-size=4000000",
            "--output-dir",
            tmp_path / "file" / "run",
        ]
        (tmp_path / "file").touch()
        done = run(
            "bash",
            "-c",
            'ulimit -n 265; exec "$@"',
            "bash",
            sys.executable,
            *words,
            check=1,
            env={
                "ASCEND_HOME_PATH": str(tmp_path),
                "ASCEND_INSTALL_PATH": str(tmp_path),
                "ASCEND_RT_VISIBLE_DEVICES": "1, 0",
                "HCCL_IF_BASE_PORT": "61000",  # above the ports that Linux gives to other programs by itself
                "PATH": "/usr/bin:/bin",
            },
        )
    rows = table(done.stdout)
    wrong = {need: row for need, row in rows.items() if row[0] == "FAIL"}
    assert set(wrong) >= {
        "device",
        "CANN",
        "driver",
        "chips",
        "visible devices",
        "shared memory",
        "open files",
        "master port",
        "disk",
        "data",
    }
    assert all(remedy for _, _, remedy in wrong.values())
    assert rows["Python"][0] == rows["torch"][0] == rows["packages"][0] == rows["HCCL ports"][0] == "ok"
    assert wrong["CANN"][1] == f"{tmp_path} (ASCEND_HOME_PATH) does not hold CANN"
    assert wrong["master port"][1] == f"not free: {port} (Address already in use)"
    assert wrong["data"][1:] == (f"--data: {tmp_path}/data has no val/ folder", "expected train/ and val/")
    assert wrong["disk"][1] == f"{tmp_path}/file cannot be written to"
    assert f"{len(wrong)} of {len(rows)} checks failed" in done.stdout


def test_green_and_red_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    found = [finding.Finding("this", "here"), finding.Finding("that", "gone", "bring it")]
    for file, codes in ((Terminal(), 2), (io.StringIO(), 0)):
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert preflight.print_table(found, file) == 1
        text = file.getvalue()
        assert text.count(preflight.PLAIN) == codes and (preflight.RED in text) == bool(codes)
        assert "-> bring it" in text and text.endswith("1 of 2 checks failed\n")
    assert preflight.print_table(found[:1], io.StringIO()) == 0


def test_a_python_that_is_newer_than_the_tested_ones(monkeypatch):
    monkeypatch.setattr(preflight.sys, "version_info", (3, 13, 2))
    found = preflight._check_python()
    assert found.found == "3.13.2" and "use Python 3.10 to 3.12" in found.remedy
    assert "CANN 9.1 takes Python up to 3.14, 9.0, 8.5 up to 3.13, 8.3, 8.2, 8.1, 8.0 up to 3.11" in found.remedy


def test_packages_that_are_missing_or_too_old(monkeypatch):
    versions = {
        "torch": "2.9.1",
        "numpy": "2.4.6",
        "pillow": "13.0.0",
        "torchvision": "0.28.0",
        "onnx": "1.23.2",
        "onnxruntime": "1.31.1",
    }

    def version(name):
        if name not in versions:
            raise preflight.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(preflight.importlib.metadata, "version", version)
    found = {each.check: each for each in preflight.run_checks(preflight.PreflightConfig())}
    assert found["torch"].found.startswith("torch 2.9.1 (torch>=2.11") and "requirements.txt" in found["torch"].remedy
    assert "tqdm not installed" in found["packages"].found and "torchvision 0.28.0" in found["packages"].found
    assert found["device, memory, data"].remedy == "install the packages above first"


def test_the_launcher_checks_first_and_starts_only_on_a_sound_machine(run, images, tmp_path):
    words = [*LAUNCH_TINY, f"--data_path={images}", "--device=cpu", "--preflight=true", "--output_dir=run"]
    done = run(*words, "--batch_size=4000000", "--", "-j", "2", check=1)
    assert "1 of 9 checks failed" in done.stdout and not (tmp_path / "run").exists() and done.stderr == ""
    done = run(*words, "--", "--epochs=1", check=0)
    assert done.stdout.index("all 9 checks passed") < done.stdout.index("tiny: 60 images")
    assert (tmp_path / "run" / "summary.json").exists()
