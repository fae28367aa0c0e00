"""common/data/labels.py: one reader of `NAME INDEX` lines for training, the check of a dataset and postprocessing."""

import pytest

from common.data import labels
from common.errors import UserError


def read(path, text, **more):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return labels.read(path, "--flag", **more)


def test_names_keep_their_order_blanks_and_bytes(tmp_path):
    text = b"b.JPEG 2\r\n\n  a  c.JPEG   0\n\xff.png 10"
    assert list(read(tmp_path / "x", text).items()) == [("b.JPEG", 2), ("a  c.JPEG", 0), ("\udcff.png", 10)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": no labels; expected a line NAME INDEX per image"),
        (" \n\n", ": no labels; expected a line NAME INDEX per image"),
        ("a 0\n\nb one\n", ", line 3: 'b one', must be NAME INDEX, for example 'ILSVRC2012_val_00000001.JPEG 65'"),
        ("a 0\n7\n", ", line 2: '7', must be NAME INDEX, for example 'ILSVRC2012_val_00000001.JPEG 65'"),
        ("a -1\n", ", line 1: 'a -1', must be NAME INDEX, for example 'ILSVRC2012_val_00000001.JPEG 65'"),
        ("a 0\nb 1\na 0\n", ", line 3: a again with label 0 (line 1: 0); every image counts once"),
        ("a 0\na 3\n", ", line 2: a again with label 3 (line 1: 0); every image counts once"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read(tmp_path / "x", text)
    assert str(error.value) == f"{tmp_path / 'x'}{message}"


def test_a_missing_file_is_named_with_the_flag(tmp_path):
    with pytest.raises(UserError) as error:
        labels.read(tmp_path / "x", "--anno-file")
    assert str(error.value) == f"--anno-file: {tmp_path / 'x'} cannot be read (No such file or directory)"


def test_keys_are_what_must_be_unique(tmp_path):
    def stem(name):
        return name.partition(".")[0]

    assert read(tmp_path / "x", "a.b.JPEG 0\nc.JPEG 1\n", key=stem) == {"a": 0, "c": 1}
    with pytest.raises(UserError, match=r"line 2: a.png again with label 0 \(line 1: 0\)"):
        read(tmp_path / "x", "a.jpg 0\na.png 0\n", key=stem)


def test_a_reader_that_reports_everything_goes_on_after_a_mistake(tmp_path):
    (tmp_path / "x").write_text("a 0\nb\na 1\nc 2\n")
    found = list(labels.lines(tmp_path / "x", "--flag"))
    assert [(line.number, line.name, line.label, bool(line.error)) for line in found] == [
        (1, "a", 0, False),
        (2, "", -1, True),
        (3, "a", 1, True),
        (4, "c", 2, False),
    ]
