"""Compare every name that this project uses of torch_npu with the real package.

    python tests/check_npu_api.py            # downloads the wheel of torch_npu 2.12 with pip into a scratch folder
    python tests/check_npu_api.py --wheel torch_npu-2.12.0-cp311-cp311-manylinux_2_28_x86_64.whl

Reads the names from the sources of this project and of the fake torch_npu in tests/fake_npu, and those of the package
from the sources in the wheel, without importing it. Then starts a program with the real package, which cannot be
imported without CANN: it must report that in one line. Exit status 1 if a name is missing.
"""

import argparse
import ast
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

from support import draw_images

ROOT = pathlib.Path(__file__).resolve().parents[1]
FAKE = ROOT / "tests" / "fake_npu" / "site" / "torch_npu"
REQUIREMENT = "torch_npu>=2.12,<2.13"
# Private names that PyTorch looks up in a device module.
_SPECIAL = ("_autoload", "_is_in_bad_fork", "_lazy_init")


def download(folder):
    """Path of a wheel of torch_npu, for this platform or else for Linux on x86-64."""
    base = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    other = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
    for options in ([], other):
        if subprocess.run([*base, *options, REQUIREMENT]).returncode == 0:
            return next(folder.glob("torch_npu-*.whl"))
    sys.exit(f"error: pip cannot download {REQUIREMENT}; give --wheel FILE")


# ---- names that are used -----------------------------------------------------------------------------------------


def dotted(node):
    """ "a.b.c" for a chain of attributes, `torch.npu` for torch.get_device_module(...), or None."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call) and dotted(node.func) == "torch.get_device_module":
        return "torch.npu"
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return None


def real_name(name):
    """torch.npu.x is torch_npu.npu.x, torchair.x is torch_npu.dynamo.torchair.x; None for names of anything else."""
    if name and name.startswith("torchair."):
        name = f"torch_npu.dynamo.{name}"
    if name and name.startswith("torch.npu."):
        name = name.replace("torch.npu.", "torch_npu.npu.", 1)
    return name if name and name.startswith("torch_npu.") else None


def used_names(path):
    """{name: keyword arguments it is called with} of one source file."""
    found = {}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch_npu":
            found.update({f"{node.module}.{alias.name}": set() for alias in node.names})
        if isinstance(node, ast.Call) and (name := real_name(dotted(node.func))):
            keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
            found.setdefault(name, set()).update(keywords)
        if isinstance(node, ast.Attribute) and (name := real_name(dotted(node))):
            found.setdefault(name, set())
    # keep a.b.c, drop its prefix a.b
    return {name: words for name, words in found.items() if not any(other.startswith(name + ".") for other in found)}


def fake_names():
    """{name: parameters} that the fake torch_npu defines."""
    found = {}
    for path in FAKE.rglob("*.py"):
        parts = path.relative_to(FAKE).with_suffix("").parts
        if parts[-1].startswith("_") and parts[-1] != "__init__":
            continue
        module = ".".join(("torch_npu", *(part for part in parts if part != "__init__")))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and is_public(node.name):
                found[f"{module}.{node.name}"] = parameters(node)
            if isinstance(node, ast.ClassDef) and is_public(node.name):
                found.update(
                    {
                        f"{module}.{node.name}.{member.name}": parameters(member)
                        for member in node.body
                        if isinstance(member, ast.FunctionDef) and is_public(member.name)
                    }
                )
            if isinstance(node, ast.Assign):
                targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                found.update({f"{module}.{name}": set() for name in names if is_public(name)})
    return found


def is_public(name):
    return not name.startswith("_") or name in _SPECIAL or name == "__version__"


def parameters(node):
    """Names of a function's parameters, for a class those of its __init__; without self."""
    if isinstance(node, ast.ClassDef):
        node = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
    if node is None:
        return set()
    return {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - {"self"}


# ---- names that the package defines ------------------------------------------------------------------------------


class Package:
    """The Python sources in a wheel."""

    def __init__(self, wheel):
        self._files = {}
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".py") and name.startswith("torch_npu/"):
                    self._files[name] = archive.read(name).decode()
        self._trees = {}

    def _module(self, dotted_name):
        base = re.sub("^torchair(?=/|$)", "torch_npu/dynamo/torchair", dotted_name.replace(".", "/"))
        return next((path for path in (f"{base}.py", f"{base}/__init__.py") if path in self._files), None)

    def _tree(self, path):
        if path not in self._trees:
            self._trees[path] = ast.parse(self._files[path])
        return self._trees[path]

    def find(self, name):
        """(place "file:line", parameters or None) where a dotted name is defined, or None."""
        parts = name.split(".")
        for cut in range(len(parts), 0, -1):  # the longest prefix that is a module
            path = self._module(".".join(parts[:cut]))
            if path:
                return (f"{path}:1", None) if cut == len(parts) else self._member(path, parts[cut:])
        return None

    def _member(self, path, rest, depth=0):
        name, *rest = rest
        for node in ast.walk(self._tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return self._inside(path, node, rest) if rest else (f"{path}:{node.lineno}", parameters(node))
            if isinstance(node, ast.Assign) and any(dotted(t) == name for t in node.targets):
                return self._attribute(path, node, rest)
            if isinstance(node, ast.ImportFrom) and depth < 5:
                for alias in node.names:
                    if (alias.asname or alias.name) in (name, "*"):
                        found = self._imported(path, node, name if alias.name == "*" else alias.name, rest, depth)
                        if found:
                            return found
        return None

    def _imported(self, path, node, name, rest, depth):
        package = path.split("/")[:-1]
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        if self._module(f"{module}.{name}"):
            return self.find(".".join([module, name, *rest]))
        target = self._module(module)
        return target and self._member(target, [name, *rest], depth + 1)

    def _inside(self, path, node, rest):
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and member.name == rest[0]:
                return f"{path}:{member.lineno}", parameters(member)
        for base in node.bases:
            found = isinstance(base, ast.Name) and self._member(path, [base.id, *rest])
            if found:
                return found
        return None

    def _attribute(self, path, node, rest):
        """An attribute of a module-level object, whose class in the same folder must have the name as a string."""
        if not rest:
            return f"{path}:{node.lineno}", None
        calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
        made_by = {func.attr if isinstance(func, ast.Attribute) else dotted(func) for func in calls}
        folder = path.rpartition("/")[0]
        for beside in (p for p in self._files if p.rpartition("/")[0] == folder):
            for owner in ast.walk(self._tree(beside)):
                if isinstance(owner, ast.ClassDef) and owner.name in made_by:
                    for n in ast.walk(owner):
                        if isinstance(n, ast.Constant) and n.value == rest[0]:
                            return f"{beside}:{n.lineno}", None
        return None

    def mentions(self, pattern):
        """Place of the first file that matches a regular expression, or None."""
        for path, content in self._files.items():
            if match := re.search(pattern, content):
                return f"{path}:{content.count(chr(10), 0, match.start()) + 1}"
        return None


# ---- the comparison ----------------------------------------------------------------------------------------------


def compare(package, names, origin):
    """Print a line for each name; returns those that are missing or take other parameters."""
    wrong = []
    for name, words in sorted(names.items()):
        found = package.find(name)
        unknown = sorted(words - found[1]) if found and found[1] is not None else []
        if not found or unknown:
            wrong.append(name)
        place = "MISSING" if not found else f"no parameter {', '.join(unknown)}" if unknown else found[0]
        print(f"{name:55} {origin(name):32} {place}")
    return wrong


def project_names():
    """({name: keywords}, {name: file}) over all sources of the project but the tests."""
    names, places = {}, {}
    for path in sorted(ROOT.glob("**/*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("tests", ".venv") or any(part.startswith(".") for part in relative.parts):
            continue
        for name, words in used_names(path).items():
            names.setdefault(name, set()).update(words)
            places.setdefault(name, str(relative))
    return names, places


def start_without_cann(wheel, folder):
    """Start a program with the real package; returns whether it reports in one line why the NPU is missing."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    passed, data = True, folder.parent / "data"
    for split in ("train", "val"):
        draw_images(data / split, ("ant", "bee"), 2)
    for kind in ("npu", "auto"):
        program = str(ROOT / "inception_v3" / "train.py")
        words = [sys.executable, program, "--data", str(data), "-b", "2", "--device", kind]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        print(f"--device {kind}: exit status {done.returncode}: {done.stderr.strip()}")
        lines = done.stderr.strip().splitlines()
        passed &= done.returncode == 2 and len(lines) == 1 and "--device cpu runs without it" in lines[0]
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=pathlib.Path, help="wheel of torch_npu; default: pip downloads it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        wheel = args.wheel or download(scratch)
        package = Package(wheel)
        names, places = project_names()
        print(f"{wheel.name}: {len(names)} names that the project uses, {len(fake_names())} of the fake\n")
        wrong = compare(package, names, places.get)
        wrong += compare(package, fake_names(), lambda name: "fake")
        hccl = package.mentions(r'register_backend\(\s*"hccl"')
        print(f"{'process group backend hccl':55} {'common/device/device.py':32} {hccl or 'MISSING'}\n")
        reported = start_without_cann(wheel, scratch / "site")
    if wrong or not hccl or not reported:
        missing = f"; not in {wheel.name} as used: {', '.join(wrong)}" if wrong else ""
        sys.exit(f"error: see above{missing}")
    print("every name is in the real package")


if __name__ == "__main__":
    main()
