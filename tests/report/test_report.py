"""tools/report.py: every number of the page is that of the files, and the page works in a browser."""

import json
import os
import pathlib
import re
import shutil

import browser as browsers
import numpy as np
import pytest
from PIL import Image
from support import fails, run_ok, run_script

from common.errors import UserError
from common.evaluation import predictions, program
from common.evaluation.predictions import Guess, Row
from common.report import evaluation, others, page, runs
from inception_v3.train import PROGRAM as INCEPTION_V3
from tools import report

CLASSES = ["<b>bold</b>", 'ants & "bees"', "</script><script>bad()</script>", "\u05d0\u05d1\U0001f41d"]


def row(path, label, *best):
    """best: (class, probability) pairs."""
    return Row(path, CLASSES[label], label, tuple(Guess(CLASSES[k], k, p) for k, p in best))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A run folder of 240 epochs with predictions of five images."""
    folder = tmp_path_factory.mktemp("run")
    Image.fromarray(np.full((50, 80, 3), 90, np.uint8)).save(folder / "a.jpg")
    records = []
    for epoch in range(1, 241):
        for step in (50, 100):
            record = dict(epoch=epoch, step=step, loss=1 / epoch, acc1=epoch / 3, lr=0.1, fps=100.0 + step)
            records.append(dict(kind="train", **record))
        counts = dict(acc1=epoch / 4, acc5=100.0, loss=2 / epoch, seen=40, skipped=0)
        records.append(dict(kind="val", epoch=epoch, step=100, **counts))
    records.append(dict(kind="train", epoch=240, step=100, loss=9.0, acc1=1.0, lr=0.0, fps=float("nan")))  # repeated
    records.append(dict(kind="bad_image", path="x/<i>.jpg", reason="truncated"))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records) + '{"kind": "tra')
    config = dict(arch="inception_v3", recipe="finetune", lr=0.5, epochs=240)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(dict(arch="inception_v3", best_acc1=60.0, best_epoch=240)))
    rows = [
        row(str(folder / "a.jpg"), 0, (0, 0.9), (1, 0.1)),
        row(str(folder / "a.jpg"), 0, (2, 0.8), (0, 0.2)),
        row("missing.jpg", 1, (2, 0.95), (3, 0.05)),
        row(str(folder / "a.jpg"), 1, (2, 0.5), (1, 0.3)),
        row(str(folder / "a.jpg"), 2, (2, 0.7), (1, 0.3)),
        Row("broken.jpg", CLASSES[0], 0, (), "truncated"),
        Row("unknown.jpg", None, None, (Guess(CLASSES[1], 1, 1.0),)),
    ]
    with predictions.writer(str(folder / "predictions.csv")) as write:
        write(rows)
    return folder


def page_data(path):
    text = pathlib.Path(path).read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def html(case, tmp_path_factory):
    """A page with every section."""
    folder = tmp_path_factory.mktemp("others")
    side = dict(name="<i>.onnx", correct=[3, 4, 4, 4, 4], milliseconds_per_image=2.5)
    numbers = dict(largest_difference=0.5, mean_difference=0.1, relative_error=0.01, cosine=0.999)
    layers = [dict(name="Mixed_5b", error=1e-3)]
    content = dict(a=side, b=side, agreed=3, images=4, causes=["color order"], layers=layers, **numbers)
    (folder / "comparison.json").write_text(json.dumps(content))
    header = "path,label,class_a,probability_a,class_b,probability_b,largest_difference\n"
    (folder / "changes.csv").write_text(f"{header}{case / 'a.jpg'},<b>,<b>,0.5,z,0.25,1\n")
    (folder / "study.json").write_text(json.dumps([dict(name="r<1>", seed=k, acc1=90.0 + k) for k in range(2)]))
    for seed in range(2):
        (folder / "r<1>" / f"seed-{seed}").mkdir(parents=True)
        record = json.dumps(dict(kind="val", epoch=1, step=4, acc1=90.0 + seed))
        (folder / "r<1>" / f"seed-{seed}" / "metrics.jsonl").write_text(record)
    for batch, fps in ((1, 100.0), (4, 300.0)):
        command = ["ais_bench", "--model", f"net_bs{batch}.om"]
        content = dict(filesinfo={}, args=command, throughput=fps, NPU_compute_time=dict(mean=1000 * batch / fps))
        (folder / f"bs{batch}_summary.json").write_text(json.dumps(content))
    files = {"--comparison": "comparison.json", "--changes": "changes.csv", "--study": "study.json"}
    words = [f"{flag}={folder / name}" for flag, name in files.items()]
    words += [f"--sweep={path}" for path in sorted(folder.glob("bs*"))]
    run_ok("tools/report.py", case, case.parent / case.name, "--benches=docs/benchmarks.json", *words)
    return case / "report.html"


def test_the_numbers_of_the_page_are_those_of_the_files(case, html):
    data = page_data(html)
    records = [json.loads(line) for line in (case / "metrics.jsonl").read_text().splitlines()[:-1]]
    run = data["runs"][0]
    val = [record for record in records if record["kind"] == "val"]
    for column in ("epoch", "step", "loss", "acc1", "acc5", "seen", "skipped"):
        assert run["val"][column] == [record[column] for record in val]
    train = [record for record in records if record["kind"] == "train"][:-2]
    assert run["train_records"] == 480
    assert run["train"]["loss"] == [*(record["loss"] for record in train), 9.0]  # of a repeated step, the last record
    assert run["train"]["fps"][-1] is None  # NaN
    assert run["train"]["position"][:3] == [0.5, 1.0, 1.5] and run["unread"] == 1
    assert run["summary"] == json.loads((case / "summary.json").read_text())
    assert run["bad_images"] == [{"path": "x/<i>.jpg", "reason": "truncated"}]
    recipe = INCEPTION_V3.recipes["finetune"].config
    assert run["differs"] == [["lr", 0.5, recipe.lr], ["epochs", 240, recipe.epochs]]
    benches = json.loads(pathlib.Path("docs/benchmarks.json").read_text())
    assert data["benches"]["rows"] == [each for each in benches if isinstance(each.get("ratio"), (int, float))]


def test_the_images_of_a_run_are_counted(images):
    found = report._data_set("inception_v3", {"recipe": "finetune", "data": str(images), "epochs": 9})
    for part in ("train", "val"):
        folders = sorted(path for path in (images / part).iterdir() if path.is_dir())
        assert found[part]["classes"] == [path.name for path in folders]
        assert found[part]["per_class"] == [len(list(path.iterdir())) for path in folders]
        assert found[part]["images"] == sum(found[part]["per_class"])
    assert report._data_set("inception_v3", {"recipe": "finetune", "data": "/nowhere"}) == {}


def test_classes_and_confusions_by_hand(case):
    found = evaluation.summarize(case / "predictions.csv", 2, lambda path: None)
    assert (found["images"], found["correct"], found["correct5"]) == (5, 2, 4)
    assert (found["failed"], found["unlabeled"]) == (1, 1)
    assert found["classes"] == CLASSES[:3]
    assert found["per_class"] == [[2, 1, 1], [2, 0, 0], [1, 1, 4]]
    assert found["pairs"] == [[1, 2, 2], [0, 2, 1]] and found["matrix"]
    assert [(each["path"], each["truth"]) for each in found["mistakes"]] == [
        ("missing.jpg", None),
        (str(case / "a.jpg"), 0.2),
    ]


def test_a_thousand_classes_have_a_list_of_pairs(tmp_path):
    names = [f"class {k}" for k in range(1000)]
    rows = [
        Row(f"{i}.jpg", names[i], i, (Guess(names[(i + 1) % 1000], (i + 1) % 1000, 0.5), Guess(names[i], i, 0.4)))
        for i in range(1000)
    ]
    with predictions.writer(str(tmp_path / "all.json")) as write:
        write(rows)
    found = evaluation.summarize(tmp_path / "all.json", 3, lambda path: None)
    assert not found["matrix"] and (len(found["pairs"]), found["all_pairs"]) == (200, 1000)
    assert len(json.dumps(found)) < 100_000


def test_a_page_of_predictions_alone_is_named_after_them(case, tmp_path):
    run_ok("tools/report.py", f"--predictions={case / 'predictions.csv'}", f"--out={tmp_path / 'x.html'}")
    assert page_data(tmp_path / "x.html")["title"] == "predictions.csv"


def test_text_cannot_end_the_script(html):
    text = html.read_text()
    assert "<script>bad()" not in text and "<b>bold" not in text
    assert page_data(html)["evaluations"][0]["classes"] == CLASSES[:3]
    assert html.stat().st_size < 3e6
    assert not re.search(r'(src|href)="https?:', text)


@pytest.fixture(scope="module")
def browser():
    if browsers.PROGRAM is None and os.geteuid() != 0:
        pytest.skip(browsers.NEEDED)
    assert browsers.PROGRAM, browsers.NEEDED
    with browsers.browser() as opened:
        yield opened


@pytest.fixture
def opened(html, browser):
    """The page at 900 pixels, its charts drawn; what its console reports fails the test."""
    browser.open(html, 900)
    browser.wait("document.querySelectorAll('.plot svg').length === 9")  # 4 of accuracy and loss, 5 others
    yield browser
    assert browser.errors == []


def test_the_page_fits_each_width_in_light_and_dark(opened):
    backgrounds = set()
    for scheme in ("light", "dark"):
        for width in (400, 900, 1600):
            opened.resize(width, scheme=scheme)
            assert opened.js("document.documentElement.scrollWidth") <= width  # tables scroll, the page does not
            backgrounds.add((scheme, opened.js("getComputedStyle(document.body).backgroundColor")))
    assert backgrounds == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")}


def test_no_label_of_a_chart_covers_another_and_no_mark_is_cut(opened):
    script = """[...document.querySelectorAll('.plot svg')].flatMap((svg) => {
      const boxes = (name) => [...svg.querySelectorAll(name)].filter((each) => getComputedStyle(each).opacity > 0)
        .map((each) => ({ text: each.textContent, ...each.getBoundingClientRect().toJSON() }));
      const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
      const labels = boxes('.role-axis-label text').filter((box) => box.text), all = svg.getBoundingClientRect();
      const outside = (box) => box.left < all.left - 1 || box.right > all.right + 1;
      return [...labels.filter((a, i) => labels.some((b, j) => j < i && meet(a, b))), ...labels.filter(outside),
        ...boxes('.mark-symbol path').filter(outside)].map((box) => box.text || 'a mark')
        .concat([...svg.querySelectorAll('.mark-symbol[clip-path], [clip-path] .mark-symbol')].map(() => 'cut'));
    })"""
    for width in (400, 900, 1600):
        opened.resize(width)
        opened.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert opened.js(script) == []


def test_every_link_leads_to_a_section(opened):
    targets = opened.js("[...document.querySelectorAll('a')].map((link) => link.getAttribute('href'))")
    assert len(targets) >= 8 and all(opened.js(f"!!document.querySelector('{each}')") for each in targets)
    for i, target in enumerate(targets):
        opened.js(f"document.querySelectorAll('a')[{i}].focus()")
        opened.key("Enter")
        opened.wait(f"location.hash === '{target}'")


def test_everything_is_reached_and_used_by_keys(opened):
    """Tab goes through all controls, each with an outline; Enter opens every table of a chart, sorts, turns dark."""
    controls = "a, button, summary, [tabindex='0']"
    number = opened.js(f"document.querySelectorAll({controls!r}).length")
    seen = "window.seen ??= new Set(); window.seen.add(document.activeElement)"
    for _ in range(number):
        opened.key("Tab")
        assert opened.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        opened.js(f"{seen}; 0")
    assert opened.js("window.seen.size") == number >= 40
    for i in range(opened.js("document.querySelectorAll('summary').length")):
        opened.js(f"document.querySelectorAll('summary')[{i}].focus()")
        opened.key("Enter")
    opened.wait("[...document.querySelectorAll('figure details')].every((each) => each.querySelector('tbody tr'))")
    for key, order in (("Enter", "ascending"), ("Space", "descending")):
        opened.js("document.querySelector('#classes th button').focus()")
        opened.key(key)
        assert opened.js("document.querySelector('#classes th').getAttribute('aria-sort')") == order
    before = opened.js("getComputedStyle(document.body).backgroundColor")
    opened.js("document.getElementById('theme').focus()")
    opened.key("Enter")
    assert opened.js("getComputedStyle(document.body).backgroundColor") != before
    opened.key("Space")
    assert opened.js("getComputedStyle(document.body).backgroundColor") == before


def test_names_and_numbers_are_shown_as_they_are(case, opened):
    cells = opened.js("[...document.querySelectorAll('#classes td.text')].map((cell) => cell.textContent)")
    assert sorted(cells[:3]) == sorted(CLASSES[:3])
    facts = opened.js("[...document.querySelectorAll('#overview tr')].map((row) => row.textContent)")
    assert "best validation top-1, %6060" in facts  # of both runs
    assert "2 of 5 images are right: 40.00 %" in opened.js("document.getElementById('classes').textContent")
    opened.js("document.querySelector('#curves summary').click()")
    opened.wait("!!document.querySelector('#curves tbody tr')")
    first = opened.js("[...document.querySelector('#curves tbody tr').cells].slice(1).map((cell) => cell.textContent)")
    assert first == ["1", "0.25"]  # validation top-1 of the first epoch
    words = {"comparison": "3 of 4 images", "study": "0.71", "sweep": "net_bs4.om"}  # 0.71: deviation of 90 and 91
    for section, text in words.items():
        assert text in opened.js(f"document.getElementById('{section}').textContent")
    assert "A: <b> 50.00 % (right)B: z 25.00 % (wrong)" in opened.js(
        "document.getElementById('comparison').textContent"
    )
    rows = json.loads(pathlib.Path("docs/benchmarks.json").read_text())
    limited = [row for row in rows if row.get("ratio") and row.get("fraction")]
    reached = "{limit}: {:.0f} %".format(100 * limited[0]["fraction"], **limited[0])
    assert reached in opened.js("document.getElementById('benches').textContent")
    assert opened.js("document.querySelectorAll('#benches .layer_2_marks path').length") == len(limited)
    assert opened.js("shown('a\\udc9c\\ud83d\\udc1d')") == "a\\x9c\U0001f41d"  # a byte that is no UTF-8, a bee


def test_curves_of_a_study_are_mean_and_range(tmp_path):
    rows = []
    for seed, accuracies in enumerate([(50.0, 60.0), (70.0, 90.0)]):
        folder = tmp_path / "probe" / f"seed-{seed}"
        folder.mkdir(parents=True)
        records = [dict(kind="val", epoch=i + 1, step=4, acc1=acc1) for i, acc1 in enumerate(accuracies)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        rows.append(dict(name="probe", seed=seed, acc1=max(accuracies)))
    (tmp_path / "study.json").write_text(json.dumps(rows))
    found = others.study(tmp_path / "study.json")
    assert found["rows"] == rows
    assert found["curves"] == [
        dict(recipe="probe", epoch=1.0, low=50.0, mean=60.0, high=70.0, seeds=2),
        dict(recipe="probe", epoch=2.0, low=60.0, mean=75.0, high=90.0, seeds=2),
    ]


def test_a_comparison_and_its_changed_images(case, tmp_path):
    content = dict(a={}, b={}, agreed=3, images=4, layers=[])
    (tmp_path / "all.json").write_text(json.dumps(content))
    header = "path,label,class_a,probability_a,class_b,probability_b,largest_difference\n"
    (tmp_path / "changes.csv").write_text(f'{header}"a,b.jpg",x,y,0.5,z,0.25,1\n')
    found = others.comparison(tmp_path / "all.json", tmp_path / "changes.csv", 5, lambda path: None)
    assert found["agreed"] == 3
    assert [(each["path"], each["probability_b"]) for each in found["changed"]] == [("a,b.jpg", 0.25)]


def test_many_records_are_thinned_and_keep_the_ends_of_epochs(tmp_path):
    lines = [json.dumps(dict(kind="train", epoch=1 + i // 1000, step=1 + i % 1000, loss=float(i))) for i in range(9000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = runs.read(tmp_path, num_runs=8)
    assert found["train_records"] == 9000 and len(found["train"]["loss"]) <= 1009
    assert [loss for loss in found["train"]["loss"] if loss % 1000 == 999] == [float(k) for k in range(999, 9000, 1000)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "RUN: missing"),
        (("/nowhere",), "RUN: /nowhere is not a folder"),
        (("--study=/nowhere.json",), "--study: /nowhere.json cannot be read"),
        (("--changes=x.csv", "--benches=docs/benchmarks.json"), "--changes: needs --comparison"),
        (("--mistakes=-1",), "--mistakes: -1"),
    ],
)
def test_mistakes_are_one_line(words, message, tmp_path):
    fails(run_script("tools/report.py", *words, "--out", tmp_path / "x.html"), message)
    assert not (tmp_path / "x.html").exists()


def test_evaluate_makes_predictions_of_older_weights_anew_without_excluded_images(case, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(case, tmp_path / "run")
    excluded = tmp_path / "list.txt"
    excluded.write_text("val/x.jpg\n")
    config = json.loads((folder / "config.json").read_text()) | dict(data=str(tmp_path), exclude=str(excluded))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model_best.pth.tar").touch()
    asked = []
    monkeypatch.setattr(program, "evaluate_folder", lambda spec, options: asked.append(options) or ("counts", None))

    def build(*words):
        monkeypatch.setattr("sys.argv", ["report.py", str(folder), *words, f"--out={tmp_path / 'x.html'}"])
        report.main()
        return capsys.readouterr().out

    os.utime(folder / "predictions.csv", (1, 1))
    assert "predictions.csv is older than model_best.pth.tar; --evaluate makes it anew" in build() and not asked
    build("--evaluate")
    assert [(each.exclude, each.predictions) for each in asked] == [(str(excluded), str(folder / "predictions.csv"))]
    os.utime(folder / "predictions.csv")
    assert "older" not in build("--evaluate") and len(asked) == 1
    (folder / "predictions.csv").unlink()
    excluded.unlink()
    with pytest.raises(UserError, match="--evaluate: .*run leaves out the images in .*list.txt, which is not there"):
        build("--evaluate")


def test_without_the_library_the_message_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(UserError, match="pip install vl-convert-python"):
        page.plotting_library()
