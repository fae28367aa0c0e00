"""The layout of the repository: imports point down one list of layers, and importing a module has no side effect."""

import ast
import pathlib
import re
import subprocess

import pytest
from support import ROOT

from tools import models

# Packages from the lowest layer up; those of one line do not import each other. docs/DESIGN.md explains the list.
BASE = "cli cpuinfo environment errors files layers parallel ports processes progress run_folder spec".split()
LAYERS = (
    {f"common.{name}" for name in BASE},
    {"common.data", "common.weights", "common.device"},
    {"common.distributed", "common.config"},
    {"common.evaluation"},
    {"common.train", "common.deploy"},
    {"common.report"},
    {"common.launch"},
    set(models.names()),
    {"tools"},
)
RANKS = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}


def modules():
    """{dotted name: path} of the product's Python files."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    product = tuple(f"{package}/" for package in ("common", *models.names(), "tools"))
    paths = [path for path in listed.stdout.split() if path.startswith(product)]
    return {
        path[:-3].replace("/", ".").removesuffix(".__init__"): ROOT / path for path in paths if (ROOT / path).exists()
    }


MODULES = modules()


def package_of(module):
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "common" else parts[0]


def imports_of(path):
    """Names of the project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return {name for name in found if name in MODULES}


def wrong_imports(module, imported):
    """Imports of one module from its own layer or a higher one."""
    own = package_of(module)
    return [
        f"{module} -> {other}"
        for other in sorted(imported)
        if other != "common"
        and package_of(other) != own
        and not RANKS[package_of(other)] < RANKS[own]
        and not (RANKS[own] == RANKS[package_of(other)] == 0)
    ]


def test_every_module_of_common_belongs_to_a_layer():
    assert {package_of(name) for name in MODULES} - {"common"} <= RANKS.keys()


def test_imports_point_to_lower_layers():
    names = [name for name in MODULES if name != "common"]
    assert [found for name in names for found in wrong_imports(name, imports_of(MODULES[name]))] == []


@pytest.mark.parametrize(
    "module, imported",
    [
        ("common.data.index", "common.evaluation.metrics"),
        ("common.train.step", "common.deploy.export"),
        ("common.weights.load", "common.device.device"),
        ("inception_v3.train", "inception_v4.spec"),
        ("common.cli", "common.config"),
    ],
)
def test_an_import_of_the_same_or_a_higher_layer_is_found(module, imported):
    assert wrong_imports(module, {imported})


def test_imports_form_no_cycle():
    graph = {name: imports_of(path) - {name} for name, path in MODULES.items()}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}


def test_no_test_module_imports_another():
    modules = sorted((ROOT / "tests").rglob("test_*.py"))
    names = {path.stem for path in modules} | {"conftest"}
    for path in modules:
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        imported = {alias.name for node in nodes for alias in node.names} | {
            getattr(node, "module", "") for node in nodes
        }
        assert not {part for name in imported for part in name.split(".")} & names, path


def test_common_names_no_model():
    pattern = rf"inception|(?<![a-z])xception|\b({'|'.join(models.names())})\b"
    for name, path in MODULES.items():
        if name.startswith("common"):
            assert not re.search(pattern, path.read_text(), re.IGNORECASE), path


def acts(node, is_program):
    """Whether a statement at the top of a module does more than define something."""
    if isinstance(node, ast.Expr):
        is_path_entry = is_program and ast.unparse(node).startswith("sys.path.insert(")
        return not isinstance(node.value, ast.Constant) and not is_path_entry
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Attribute | ast.Subscript) for target in targets)
    if isinstance(node, ast.If):
        return ast.unparse(node.test) not in ("__name__ == '__main__'", "TYPE_CHECKING", "typing.TYPE_CHECKING")
    defines = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return not isinstance(node, defines)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_importing_a_module_does_nothing(name):
    path = pathlib.Path(MODULES[name])
    is_program = "__main__" in path.read_text()
    assert [ast.unparse(node) for node in ast.parse(path.read_text()).body if acts(node, is_program)] == []
