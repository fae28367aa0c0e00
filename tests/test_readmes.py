"""Every bash block of every README runs, in order, from the repository's root as its reader sees it."""

import ast
import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from support import ROOT, run_program

from tools import models

READMES = [path.relative_to(ROOT) for path in sorted(ROOT.glob("**/README.md"))]
READMES = [path for path in READMES if not path.parts[0].startswith(".")]  # .venv, .pytest_cache


def blocks(path):
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("readme", [readme for readme in READMES if blocks(readme)], ids=str)
def test_every_bash_block_runs(readme, tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in {line.partition("/")[0] for line in tracked.splitlines()}:  # not what somebody trained there
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks(readme):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def shown_commands():
    """(document, words) of the commands in blocks that a document shows and no test runs."""
    pattern = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for document in sorted({*DOCUMENTS}):
        for kind, block in pattern.findall((ROOT / document).read_text()):
            for line in block.replace("\\\n", " ").splitlines() if kind in ("", "console") else []:
                for command in re.sub(r"^(node \d)?\$ |\s#.*", "", line).split(" && "):
                    if re.match(r"(python|bash|sh) \S+\.(py|sh)\b", command):
                        yield document, shlex.split(command)[1:]


@functools.cache
def help_of(program):
    return run_program(program, "--help", cwd=ROOT).stdout.replace("_", "-")


def test_commands_that_are_only_shown_have_programs_and_options_that_exist():
    """train.py parses them, launchers print their command, the --help of other programs lists every option."""
    shown = list(shown_commands())
    assert len(shown) > 60
    for document, (name, *words) in shown:
        program = ROOT / name if (ROOT / name).exists() else ROOT / document.parent / name
        where = f"{document}: {name}"
        assert program.is_file(), where
        if program.name == "train.py":
            models.program(program.parent.name).parse(words)
        elif program.suffix == ".sh" and not any(word[0].isupper() for word in words):  # DATA_PATH
            run_program(program, "--dry_run=true", *words, cwd=ROOT)
        elif program.suffix == ".py":
            for flag in (word.partition("=")[0].replace("_", "-") for word in words if re.match("--?[a-z]", word)):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(program)), f"{where} {flag}"


DOCUMENTS = [*READMES, *(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("document", sorted({*DOCUMENTS}), ids=str)
def test_links_to_files_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / document).read_text()):
        if "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), target


PAIRS = [(readme, readme.with_name("README.zh-CN.md")) for readme in READMES]


def fenced(path):
    """The fenced blocks of a document, and its text without them."""
    pattern = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    text = (ROOT / path).read_text()
    return pattern.findall(text), pattern.sub("", text)


def headings(path):
    return re.findall(r"^(#+) (.+)$", fenced(path)[1], re.MULTILINE)


def anchors(path):
    """GitHub's: lower case, no punctuation, hyphens for blanks, a number behind those that repeat."""
    slugs = [re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for _, title in headings(path)]
    return {slug + (f"-{before}" if (before := slugs[:i].count(slug)) else "") for i, slug in enumerate(slugs)}


def links(path):
    """File (itself where none is named) and anchor of each link into the repository."""
    found = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", fenced(path)[1])
    return [((ROOT / path).parent / (name or path.name), anchor) for name, anchor in found if "://" not in name]


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda path: str(path.parent))
def test_both_languages_have_the_same_commands_and_structure(english, chinese):
    """The blocks are identical, so test_every_bash_block_runs need not run those of the translation too."""
    assert fenced(english)[0] == fenced(chinese)[0]
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    lines = [(ROOT / path).read_text().splitlines() for path in (english, chinese)]
    assert lines[0][2] == "English | [简体中文](README.zh-CN.md)"
    assert lines[1][2] == "[English](README.md) | 简体中文"
    markers, columns = (
        [[shape(line) for line in text if line.startswith(start)] for text in lines]
        for start, shape in (("<!-- ", str), ("|", lambda row: row.count("|")))
    )
    assert markers[0] == markers[1]
    assert columns[0] == columns[1]
    targets = [
        sorted(target.resolve().with_name(target.name.replace(".zh-CN", "")) for target, _ in links(path))
        for path in (english, chinese)
    ]
    assert targets[0] == targets[1]
    assert [target for target, _ in links(chinese)[1:] if target.name == "README.md"] == []
    for path in (english, chinese):
        for target, anchor in links(path):
            assert target.exists(), f"{path}: {target}"
            assert not anchor or anchor in anchors(target), f"{path}: {target}#{anchor}"


def literals():
    """The texts of the product's code, with a zero for each value of an f-string."""
    for folder in ("common", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def messages(path):
    """The first column of the table of messages."""
    section = re.search(r"\n\|---\|---\|\n((?:\|.*\n)*)", (ROOT / path).read_text())[1]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def test_the_messages_that_the_readme_explains_are_those_of_the_code():
    assert messages("README.md") == messages("README.zh-CN.md") and len(messages("README.md")) >= 12
    values = r"\b(?:N \.heic|DIR|N|FILE|REASON|URL|NAME|DEVICE|METHOD|npu|nan|train)\b|^--[a-z-]+(?=:)"
    texts = [text for text in literals() if len(text) < 1000]
    for message in messages("README.md"):
        pattern = re.compile(".*".join(map(re.escape, re.split(values, message))), re.DOTALL)
        assert any(map(pattern.search, texts)), message
