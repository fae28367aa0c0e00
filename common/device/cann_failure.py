"""Why atc or ais_bench failed: the first line of their output that says so, and what to do about it."""

import re
from collections.abc import Sequence

from common.device import cann

INSTALL_AIS_BENCH = (
    "install the aclruntime and ais_bench 0.0.2 wheels from "
    "https://aisbench.obs.myhuaweicloud.com/packet/ais_bench_infer/0.0.2/ and source CANN's set_env.sh; "
    "tools/run_onnx.py does the same on any machine"
)
_UNKNOWN_OPSET = "an operator set this CANN has no tables for; export with --opset 11"
_MISSING_PACKAGES = (
    "atc's Python packages are missing; `python3 -m pip install decorator sympy cffi protobuf attrs pyyaml scipy "
    "psutil`, with the python3 that is first in PATH"
)
_OPS_PACKAGE = "no kernel for this chip; since CANN 8.5 the chip's ops package must be installed too"
_LOOK_AT_CARD = "see `npu-smi info` for the cards, their numbers and what uses them"

# An error code, and what precedes the sentence of a CANN error: "EZ9999: [PID: 7] 2025-01-01-00:00:00.000.000 ...",
# "E89999[PID: 7] 2025-... (E89999): ...", "[PID: 7] 2025-... Invalid_Argument(E10001): ...".
_CODE = re.compile(r"\b(E[A-Z\d]\d{4})\b")
_HEADER = re.compile(r"^[):\s]*(?:\[PID:\s*\d+\])?\s*(?:\d{4}-\d\d-\d\d-[\d:.]+)?\s*(?:\w*\(E\w+\):)?\s*")
_SOURCE = re.compile(r"\s*(?:\[(?:FUNC|FILE|LINE):[^\]]*\])+\s*$")
_NO_REASON = re.compile(r"(?:(?:Inner|Internal) Error!?|TraceBack \(most recent call last\):)?$", re.IGNORECASE)
_LOGGED = re.compile(r"^\[ERROR\]\s*(\S.*)", re.IGNORECASE)
_EXCEPTION = re.compile(r"^((?:[\w.]+(?:Error|Exception)|[\w.-]+: error): *\S.*)")
_LOADER = re.compile(r"error while loading shared libraries: (.*)")
# What to do, by what the cause says; the first that matches.
_REMEDIES_BY_TEXT: tuple[tuple[str, str], ...] = (
    (r"No module named '(?:aclruntime|ais_bench)\b", INSTALL_AIS_BENCH),
    (r"libascend_hal\.so", cann.INSTALL_DRIVER),
    (r"np\.\w+`? was removed|numpy\.core\.multiarray|_ARRAY_API", "this CANN needs `python3 -m pip install 'numpy<2'`"),
    (r"dynamic batch om model detected|none of the batches", "give --dym-batch"),
    (r"dymBatch parameter is not correct", "give --dym-batch one of the batch sizes that the model was built for"),
    (r"dynamic_batch_size parameter is not specified", "the model has one batch size; leave out --dym-batch"),
    (
        r"filesize: ?\d+ not match",
        "the files are of another size or type than the model's input; run preprocess.py for it",
    ),
    (
        r"load model from file failed",
        "the file is damaged, or made for another chip or by a newer CANN; make it with tools/run_atc.py",
    ),
    (r"open device \d+ failed|SetDevice|\b(?:107001|507033)\b", _LOOK_AT_CARD),
)
_REMEDIES_BY_CODE = {
    "E10501": "an operator this CANN does not know; export with --opset 11",
    "E16002": _UNKNOWN_OPSET,
    "E19010": _UNKNOWN_OPSET,
    "EZ3003": _OPS_PACKAGE,
    "E40000": _MISSING_PACKAGES,
    "E40020": _MISSING_PACKAGES,
    "E40024": _MISSING_PACKAGES,
    "EC0010": _MISSING_PACKAGES,
}


def explain(output: str, is_converter: bool = False) -> str:
    """ "cause; what to do" of a program's output; the cause alone where nothing is known about it.

    Args:
      is_converter: the program is atc, which needs no card and no driver.
    """
    lines = _without_frames(output)
    code, cause = _coded(lines)
    cause = _first(_LOADER, lines) or cause or _first(_LOGGED, lines) or _first(_EXCEPTION, lines)
    cause = cause or next((line.strip() for line in reversed(lines) if line.strip()), "nothing was printed")
    needs_devlib = is_converter and "libascend_hal.so" in output
    remedy = cann.USE_DEVLIB if needs_devlib else _remedy(code, cause)
    return f"{cause}; {remedy}" if remedy else cause


def _without_frames(output: str) -> list[str]:
    """The lines without the source code that typer draws around a traceback, its folded last line joined again."""
    lines = list[str]()
    is_after_frame = False
    for line in output.splitlines():
        if line[:1] in "│╭╰" and line:
            is_after_frame = line[0] == "╰"
            continue
        if is_after_frame and lines and _EXCEPTION.match(lines[-1]) and line[:1] not in ("[", ""):
            lines[-1] += f" {line}"
            continue
        is_after_frame = is_after_frame and _EXCEPTION.match(line) is not None
        lines.append(line)
    return lines


def _coded(lines: Sequence[str]) -> tuple[str, str]:
    """(code, "code: sentence") of the first CANN error; an "Inner Error!" has its sentence on a following line."""
    for number, line in enumerate(lines):
        found = _CODE.search(line)
        if not found:
            continue
        texts = [_sentence(line[found.end() :])]
        for following in lines[number + 1 : number + 4]:
            same = _CODE.match(following.strip())
            texts.append(_sentence(following.strip()[same.end() if same else 0 :]))
        reason = next((text for text in texts if not _NO_REASON.match(text)), texts[0])
        return found[1], f"{found[1]}: {reason}"
    return "", ""


def _sentence(text: str) -> str:
    return _SOURCE.sub("", _HEADER.sub("", text, count=1)).strip()


def _first(pattern: re.Pattern[str], lines: Sequence[str]) -> str:
    return next((match[1].strip() for match in map(pattern.search, lines) if match), "")


def _remedy(code: str, cause: str) -> str:
    for pattern, remedy in _REMEDIES_BY_TEXT:
        if re.search(pattern, cause):
            return remedy
    missing = re.search(r"No module named '([\w.]+)'", cause)
    if missing and code:
        return f"`python3 -m pip install {missing[1]}`, with the python3 that is first in PATH: atc runs that one"
    if missing:
        return f"`pip install {missing[1]}`"
    if "cannot open shared object" in cause:
        return cann.how_to_source()
    return _REMEDIES_BY_CODE.get(code, "")
