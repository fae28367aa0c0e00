"""npu-smi's tables and boards of every chip family, as users posted them: the chip is read, and never guessed."""

import pytest
from support import NPU_SMI_310P

from common.device import npu_smi
from common.errors import UserError

A2 = """
| npu-smi 25.2.0                   Version: 25.2.0                                               |
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | {health:13} | 94.6        36                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          37705/ 65536         |
+===========================+===============+====================================================+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
| 0       910               | 310910        | python                   | 310                     |
| 1       910               | OK            | python                   | 310                     |
"""
A3 = """
| 0     Ascend910           | NA            | 172.6       52                0    / 0             |
| 0     0                   | 0000:9D:00.0  | 0           0    / 0          3119 / 65536         |
| 0     Ascend910           | NA            | -           54                0    / 0             |
| 1     1                   | 0000:9F:00.0  | 0           0    / 0          2870 / 65536         |
"""
BOARD_A3 = "\tNPU ID                         : 0\n\tChip Name                      : Ascend910\n"
TABLE_310B = """
| 0       310B4     | Alarm           | 8.0          50                15   / 15             |
| 0       0         | NA              | 0            1400 / 7545                             |
"""
TABLE_950 = """
+--------+------------------+---------------+-----------------------------------------------------+
| NPU ID | Name             | Health        | Power(W)    Temp(C)           Hugepages-Usage(page) |
|        |                  | Bus-Id        | NPU Util(%) Memory-Usage(MB)  HBM-Usage(MB)         |
+========+==================+===============+=====================================================+
| 0      | Ascend950{kind}      | OK            | 195.6       56                0     / 0             |
|        |                  | NA            | 0           0    / 0          5239  / 131072        |
+========+==================+===============+=====================================================+
| No running processes found in NPU 0                                                             |
"""
BOARD_950 = """\
NPU ID                         : 0
Product Name                   : A310-50-C00MM304A1
NPU Name                       : 9579
Chip Name                      : Ascend950PR
PCIe Bus Info                  : 0000:61:00.0
"""
USED = (
    "DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\n"
    "dcmi model initialized failed, because the device is used. ret is -8020\n"
)
WITH_C, WITHOUT_C = "info -t board -i 0 -c 0", "info -t board -i 0"


@pytest.fixture
def answers(monkeypatch):
    """answers({arguments: output}): what npu-smi prints; other arguments are refused."""

    def set_answers(outputs):
        def run(*arguments):
            text = outputs.get(" ".join(arguments))
            if text is None:
                raise npu_smi.NpuSmiError(f"npu-smi {' '.join(arguments)} ended with 1: usage")
            return text.splitlines()

        monkeypatch.setattr(npu_smi, "_npu_smi", run)
        monkeypatch.setattr(npu_smi.shutil, "which", lambda name: name)

    return set_answers


@pytest.mark.parametrize(
    ("outputs", "cards", "chip"),
    [
        ({"info": NPU_SMI_310P}, [("0", "310P3", "OK"), ("1", "310P3", "OK")], "Ascend310P3"),
        ({"info": A2.format(health="Warning")}, [("0", "910B3", "Warning")], "Ascend910B3"),
        ({"info": A2.format(health="--")}, [("0", "910B3", "--")], "Ascend910B3"),
        ({"info": A2.format(health="OK").replace("910B3", "910b3")}, [("0", "910b3", "OK")], "Ascend910B3"),
        ({"info": TABLE_310B}, [("0", "310B4", "Alarm")], "Ascend310B4"),
        (
            {"info": A3, WITH_C: BOARD_A3 + "\tNPU Name                       : 9392\n"},
            [("0", "Ascend910", "NA")] * 2,
            "Ascend910_9392",
        ),
        ({"info": A3, WITH_C: BOARD_A3, WITHOUT_C: BOARD_A3 + "\tNPU Name : 9382\n"}, None, "Ascend910_9382"),
        ({"info": A3, WITH_C: "Chip Type : Ascend\nChip Name : 910B4\n"}, None, "Ascend910B4"),
        (
            {"info": TABLE_950.format(kind="PR"), WITHOUT_C: BOARD_950},
            [("0", "Ascend950PR", "OK")],
            "Ascend950PR_9579",
        ),
        (
            {"info": TABLE_950.format(kind="DT"), WITHOUT_C: "Chip Name: Ascend950DT\nNPU Name: 958b\n"},
            [("0", "Ascend950DT", "OK")],
            "Ascend950DT_958b",
        ),
    ],
)
def test_chip_of_every_family(answers, outputs, cards, chip):
    answers(outputs)
    assert npu_smi.detect_chip_name() == chip
    assert cards is None or npu_smi.cards() == cards


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"info": A3, WITH_C: BOARD_A3, WITHOUT_C: BOARD_A3}, ["calls the chip Ascend910 only", "no NPU Name"]),
        ({"info": A3, WITH_C: BOARD_A3 + "\tNPU Name : -\n", WITHOUT_C: ""}, ["calls the chip Ascend910 only"]),
        ({"info": A3}, ["info -t board -i 0 ended with 1"]),
        ({"info": TABLE_950.format(kind="PR"), WITHOUT_C: "Chip Name : Ascend950PR\n"}, ["Ascend950PR only"]),
        ({"info": USED}, ["because the device is used. ret is -8020"]),
        ({"info": "This command is not supported.\n"}, ["This command is not supported."]),
        ({"info": "| NPU     Name      | Health  |\n"}, ["shows no card"]),
    ],
)
def test_a_chip_is_never_guessed(answers, outputs, words):
    answers(outputs)
    with pytest.raises(UserError) as error:
        npu_smi.detect_chip_name()
    assert all(word in str(error.value) for word in [*words, "--soc-version"]), error.value


def test_a_device_in_use_has_its_own_remedy(answers):
    answers({"info": USED})
    with pytest.raises(npu_smi.NpuSmiError) as error:
        npu_smi.cards()
    assert "container" in error.value.remedy and "/usr/local/dcmi" in error.value.remedy


@pytest.mark.parametrize(
    ("typed", "name", "folder", "package"),
    [
        ("ascend310p3", "Ascend310P3", "ascend310p", "Ascend-cann-310p-ops"),
        ("910b3", "Ascend910B3", "ascend910b", "Ascend-cann-910b-ops"),
        ("Ascend910B2C", "Ascend910B2C", "ascend910b", "Ascend-cann-910b-ops"),
        ("910b4-1", "Ascend910B4-1", "ascend910b", "Ascend-cann-910b-ops"),
        ("910prob", "Ascend910ProB", "ascend910", "Ascend-cann-910-ops"),
        ("910B", "Ascend910B", "ascend910", "Ascend-cann-910-ops"),
        ("ASCEND910_9392", "Ascend910_9392", "ascend910_93", "Ascend-cann-A3-ops"),
        ("310", "Ascend310", "ascend310", "Ascend-cann-310-ops"),
        ("310b1", "Ascend310B1", "ascend310b", "Ascend-cann-310b-ops"),
        ("ascend950pr_957a", "Ascend950PR_957a", "ascend950", "Ascend-cann-950-ops"),
    ],
)
def test_name_as_atc_spells_it_and_its_operators(typed, name, folder, package):
    assert npu_smi.check_chip_name(typed) == name
    assert npu_smi.operator_folder(name) == folder and npu_smi.operator_package(name) == package


@pytest.mark.parametrize("typed", ["Ascend42", "910B33", "310P3x", "950PR", "Ascend", ""])
def test_what_is_no_chip(typed):
    with pytest.raises(UserError, match="--soc-version: "):
        npu_smi.check_chip_name(typed)
