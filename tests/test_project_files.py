"""The installed package, the pinned versions and the continuous integration agree with the tree."""

import pathlib
import re
import subprocess

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration, load_file
from support import ROOT

from tools import models

PRODUCT = ("common", *models.names(), "tools")


def requirements(name):
    """The requirements of a file and of those that it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    included = [requirements(line[3:].strip()) for line in lines if line.startswith("-r ")]
    return [Requirement(line) for line in lines if line and not line.startswith("-")] + sum(included, [])


def test_pip_install_takes_every_module_and_the_runtime_requirements(monkeypatch):
    monkeypatch.chdir(ROOT)
    installed = apply_configuration(Distribution(), "pyproject.toml")
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {path.rpartition("/")[0] for path in listed.split() if path.startswith(tuple(f"{p}/" for p in PRODUCT))}
    assert folders <= {package.replace(".", "/") for package in installed.packages}
    assert {package.partition(".")[0] for package in installed.packages} == set(PRODUCT)
    assert set(map(Requirement, installed.install_requires)) == set(requirements("requirements.txt"))


def test_mypy_checks_every_package():
    assert load_file(ROOT / "pyproject.toml")["tool"]["mypy"]["files"] == list(PRODUCT)


def test_every_requirement_has_a_tested_version_within_its_range():
    pins = {canonicalize_name(pin.name): pin.specifier for pin in requirements("constraints.txt")}
    for requirement in requirements("requirements-dev.txt"):
        (pin,) = pins[canonicalize_name(requirement.name)]
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), requirement


def test_continuous_integration_runs_make_check_and_make_test():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"^ *- run: (.*)", workflow, re.MULTILINE) == ["make check", "make test"]
    assert re.findall(r"^make .*", (ROOT / ".ci" / "run").read_text(), re.MULTILINE) == ["make check", "make test"]


def test_design_names_every_shared_module():
    rows = re.findall(r"^\| `(common/[^|]*)` \| (.*) \|$", (ROOT / "docs" / "DESIGN.md").read_text(), re.MULTILINE)
    described = {folder.rstrip("/").removesuffix("/*.py"): set(re.findall(r"`([^`]+)`", text)) for folder, text in rows}
    for path in (ROOT / "common").rglob("*.*"):
        if path.suffix in (".py", ".sh") and path.name != "__init__.py":
            package = path.parent.relative_to(ROOT).as_posix()
            names = described[package] | {pathlib.PurePath(name).stem for name in described}
            assert {path.stem, path.name} & names, f"{path} is missing in the table of docs/DESIGN.md"
