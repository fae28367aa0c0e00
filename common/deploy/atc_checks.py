"""What run_atc.py checks of CANN before it starts atc, whose own messages about it are late and unclear."""

import json
import shutil
import subprocess

from common import processes
from common.device import cann, npu_smi, versions

# Modules that atc's operator compiler imports, and their packages.
_MODULES = {
    **{name: name for name in "numpy decorator sympy cffi scipy psutil".split()},
    "attr": "attrs",
    "yaml": "pyyaml",
}
_ASK_PYTHON = f"""
import importlib.util, json, sys
missing = [name for name in {list(_MODULES)} if importlib.util.find_spec(name) is None]
numpy = None if "numpy" in missing else __import__("numpy").__version__
print(json.dumps([sys.version_info[:2], numpy, missing]))
"""


def opset_problem(opset: int, is_other_machine: bool) -> str | None:
    """Why not every atc parses this ONNX opset, or the installed one does not; None if there is no problem.

    Args:
      is_other_machine: the OM file may be made elsewhere, so that every CANN counts and not only the installed one.
    """
    installed = versions.cann(cann.version())
    considered = [installed] if installed and not is_other_machine else versions.canns()
    refusing = [each for each in considered if not each.opsets[0] <= opset <= each.opsets[1]]
    if not refusing:
        return None
    names = ", ".join(f"{each.cann} (takes {each.opsets[0]} to {each.opsets[1]})" for each in refusing)
    return f"opset {opset}, which the atc of CANN {names} does not parse; --opset 11 of the export suits every CANN"


def environment_problems(chip: str) -> list[str]:
    """What is missing of the installed CANN, one line each; nothing if no CANN is found."""
    version = cann.version()
    if version is None:
        return []
    found = []
    chips = cann.operator_chips()
    if chips is not None and npu_smi.operator_folder(chip) not in chips:
        found.append(
            f"CANN {version} has operators for {', '.join(chips) or 'no chip'}, not for {chip}: atc will find no "
            f'"supported Ops kernel"; install {npu_smi.operator_package(chip)}'
        )
    return found + _python_problems(versions.cann(version))


def _python_problems(series: versions.Cann | None) -> list[str]:
    """Problems of the python3 that is first in PATH: atc runs its operator compiler in that one."""
    python3 = shutil.which("python3")
    if python3 is None:
        return ["python3 is not in PATH, atc needs one"]
    ends_with_this = processes.ending_with_this()
    done = subprocess.run([python3, "-c", _ASK_PYTHON], capture_output=True, text=True, preexec_fn=ends_with_this)
    if done.returncode != 0:
        return []
    python, numpy, missing = json.loads(done.stdout)
    found = []
    if missing:
        packages = " ".join(_MODULES[name] for name in missing)
        found.append(f"{python3}, which atc runs, lacks {packages}; `{python3} -m pip install {packages}`")
    if series and series.python and not series.takes_python(python):
        low, high = series.python
        found.append(
            f"{python3}, which atc runs, is Python {python[0]}.{python[1]}; CANN {series.cann} takes {low} to {high}"
        )
    if series and numpy and not series.takes_numpy(numpy, python):
        found.append(
            f"{python3}, which atc runs, has NumPy {numpy}; CANN {series.cann} takes {series.numpy}: "
            f"`{python3} -m pip install 'numpy<2'`"
        )
    return found
