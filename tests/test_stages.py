"""The table of stages in docs/DESIGN.md: every model has a program for every stage."""

import re

import pytest
from support import ROOT

from tools import models

TABLE = re.search(r"<!-- stages -->\n(.*?)<!-- /stages -->", (ROOT / "docs" / "DESIGN.md").read_text(), re.DOTALL)[1]
STAGES = {
    stage: re.findall(r"`([^`]+)`", programs)
    for stage, programs in re.findall(r"^\| (\w+) \| (`.*`) \|$", TABLE, re.MULTILINE)
}
EXPECTED = set(
    "train eval resume demo export quantize compare preprocess convert infer postprocess bench weights".split()
)


def programs(model, stage):
    """The table's command lines of a stage for one model."""
    lines = [line.replace("MODEL", model) for line in STAGES[stage]]
    return [line for line in lines if line.split("/")[0] in (model, "tools")]


def test_the_table_has_every_stage():
    assert set(STAGES) == EXPECTED


@pytest.mark.parametrize("model", models.names())
@pytest.mark.parametrize("stage", sorted(EXPECTED))
def test_every_model_has_a_program_for_every_stage(model, stage):
    found = programs(model, stage)
    assert found
    assert all((ROOT / line.split()[0]).is_file() for line in found)


@pytest.mark.parametrize(
    "line", sorted({line for model in models.names() for s in STAGES for line in programs(model, s)})
)
def test_the_programs_answer_help_and_have_the_options_of_the_table(run, line):
    program, *options = line.split()
    shown = run(ROOT / program, "--help").stdout
    assert "usage:" in shown
    for option in options:
        assert option in (shown if option.startswith("--") else models.names())


def test_an_option_that_names_a_model_takes_every_model(run):
    """--arch of the tools: an unknown network is an error that lists all."""
    program = STAGES["weights"][0].split()[0]
    error = run(ROOT / program, "--arch", "unknown", "a.pth", "b.pth", check=2).stderr
    assert all(name in error for name in models.names())
