"""common/data/labels.py: one reader of `NAME INDEX` lines for training, the check of a dataset and postprocessing."""

import collections

import pytest
from support import REAL_DATA

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
        ("a 0\n\nb\n", ", line 3: 'b', must be NAME INDEX, for example 'ILSVRC2012_val_00000001.JPEG 65'"),
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


READ = {
    "tabs": b"a.JPEG\t1\nb.JPEG\t2\n",
    "commas": b"a.JPEG,1\nb.JPEG,2\n",
    "commas, quotes, carriage returns": b'"a.JPEG","1"\r\n"b.JPEG", "2"\r\n',
    "semicolons": b"a.JPEG;1\nb.JPEG;2\n",
    "heading": b"filename,label\na.JPEG,1\nb.JPEG,2\n",
    "utf-8 with a mark": b"\xef\xbb\xbfa.JPEG 1\nb.JPEG 2\n",
    "utf-16": "a.JPEG 1\nb.JPEG 2\n".encode("utf-16"),
    "utf-16, big-endian": b"\xfe\xff" + "a.JPEG 1\r\nb.JPEG 2".encode("utf-16-be"),
    "old macs": b"a.JPEG 1\rb.JPEG 2\r",
    "folder": b"val/a.JPEG 1\n./val/b.JPEG 2\n",
    "absolute": b"/data/imagenet/val/a.JPEG 1\nC:\\val\\b.JPEG 2\n",
    "class names": b"a.JPEG n01443537\nb.JPEG n01484850\n",
    "class names with tabs": b"a.JPEG\tgolden retriever\nb.JPEG\tn01484850\n",
    "class names with blanks": b"val/a.JPEG golden retriever\nb.JPEG n01484850\n",
    "decomposed class names": "a.JPEG cafe\u0301\nb.JPEG n01484850\n".encode(),
}
CLASSES = {"golden": ["n01440764", "golden retriever", "n01484850"], "synset": ["n01440764", "n01443537", "n01484850"]}
CLASSES["cafe"] = ["n01440764", "caf\u00e9", "n01484850"]


@pytest.mark.parametrize("kind", READ)
def test_what_can_be_read_without_doubt(tmp_path, kind):
    classes = CLASSES["golden" if b"golden" in READ[kind] else "cafe" if b"cafe" in READ[kind] else "synset"]
    assert list(read(tmp_path / "x", READ[kind], classes=classes).items()) == [("a.JPEG", 1), ("b.JPEG", 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("65 a.JPEG\n", "line 1: '65 a.JPEG', must be NAME INDEX, .*; it looks like INDEX NAME: swap the columns"),
        ("a.JPEG 65 12 30\n", "line 1: 'a.JPEG 65 12 30', must be NAME INDEX, .*; it has more columns: keep two"),
        ("a.JPEG,65,sea snake\n", "line 1: .*; it has more columns: keep two"),
        ("ImageId,PredictionString\na,n01440764 1 2 3 4\n", "line 1: .*; it looks like Kaggle's LOC_val_solution.csv"),
        ("a,n01440764 85 1 499 272\n", "line 1: .*; it looks like Kaggle's LOC_val_solution.csv: keep the image and"),
        (
            "a.JPEG n01440764\n",
            "line 1: .*; it looks like NAME CLASS: write the position of the class among the sorted",
        ),
        ('{"a.JPEG": 1}\n', "line 1: .*; it looks like JSON"),
        ("n01440764\nn01443537\n", "line 1: 'n01440764', must be NAME INDEX"),
        ("val/ 3\n", "line 1: 'val/ 3', must be NAME INDEX"),
        (
            "a.JPEG 1".encode("utf-16-le"),
            "x: it holds zero bytes, as UTF-16 without a byte order mark does; save it as",
        ),
        (b"\xff\xfea", "x: 'utf-?16.*' codec can't decode"),
        (
            "490\n361\n",
            "x: holds one number a line and no image names, .*; give --label-numbers=ilsvrc2012-ids for that",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "x", text)
    assert "\n" not in str(error.value)


def test_a_class_that_is_not_known_is_named(tmp_path):
    with pytest.raises(UserError, match="none of the 3 class folders is called n99$"):
        read(tmp_path / "x", "a n01440764\nb n99\n", classes=CLASSES["synset"])


def test_numeric_names_of_class_folders_are_not_taken_for_their_index(tmp_path):
    """NAME INDEX is the documented form; of folders 1, 10, 2 the index of folder 2 is 2, of folder 10 it is 1."""
    assert read(tmp_path / "x", "a 2\nb 1\n", classes=["1", "10", "2"]) == {"a": 2, "b": 1}


def test_numbers_from_1(tmp_path):
    assert read(tmp_path / "x", "b.png 1\na.png 3\n", numbers="from-1") == {"b.png": 0, "a.png": 2}
    assert read(tmp_path / "x", "1\n3\n", numbers="from-1", images=["a.png", "b.png"]) == {"a.png": 0, "b.png": 2}
    with pytest.raises(UserError, match="line 1: label 0, must be 1 and more with --label-numbers=from-1"):
        read(tmp_path / "x", "b.png 0\n", numbers="from-1")
    with pytest.raises(UserError, match="holds 2 numbers without image names, but there are 3 images"):
        read(tmp_path / "x", "1\n3\n", numbers="from-1", images=["a", "b", "c"])


def test_the_ground_truth_of_ilsvrc2012(tmp_path):
    """Its first ten numbers, and the indices of the same ten images that torchvision, timm and Keras agree on."""
    ids = [490, 361, 171, 822, 297, 482, 13, 704, 599, 164]
    images = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 11)]
    text = "\n".join(map(str, ids)) + "\n"
    found = read(tmp_path / "x", text, numbers="ilsvrc2012-ids", images=images)
    assert found == dict(zip(images, [65, 970, 230, 809, 516, 57, 334, 415, 674, 332], strict=True))
    assert sorted(labels._ilsvrc2012_indices()) == list(range(1000))
    for numbers in ("from-0", "from-1"):  # that file's numbers are neither
        with pytest.raises(
            UserError, match="are not positions of class folders; give --label-numbers=ilsvrc2012-ids, or"
        ):
            read(tmp_path / "x", text, numbers=numbers, images=images)
    with pytest.raises(UserError, match=r"line 2: label 1001, must be 1\.\.1000 with --label-numbers=ilsvrc2012-ids"):
        read(tmp_path / "x", "1\n1001\n", numbers="ilsvrc2012-ids", images=images[:2])


@pytest.mark.realdata
@pytest.mark.skipif(not (REAL_DATA / "labels").is_dir(), reason="the real labels are not here")
def test_the_label_file_of_ilsvrc2012_has_every_class_fifty_times():
    found = labels.read(REAL_DATA / "labels" / "ILSVRC2012_val_label.txt", "--flag")
    assert collections.Counter(found.values()) == dict.fromkeys(range(1000), 50)


def test_names_mean_the_only_image_that_fits():
    images = ["a.JPEG", "caf\u00e9.png", "c.v2.jpg", "twice.jpg", "twice.png", "e.jpg"]
    names = ["a.png", "a", "cafe\u0301.png", "cafe\u0301", "c.v2", "twice.png", "twice", "c", "none.jpg", "e.xml"]
    assert list(labels.image_names(names, images).values()) == [
        "a.JPEG", "a.JPEG", "caf\u00e9.png", "caf\u00e9.png", "c.v2.jpg", "twice.png", None, None, None, "e.jpg"
    ]  # fmt: skip
