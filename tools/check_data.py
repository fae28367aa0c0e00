"""Find what is wrong with a dataset before a training finds it.

    python tools/check_data.py /data/imagenet

Looks at every image below DIR, which holds train/ and val/ (class folders; or a flat val/ beside val_label.txt), or
class folders itself, and reports files that are empty, broken or have too many pixels to be decoded; copies within
training, and of validation images in training; classes of very different size, without images, or unknown to training.
The list it writes names the images to leave out: `train.py --exclude FILE` and `eval.py --exclude FILE` do so. Images
of validation are listed only where they do not decode, so that accuracies stay comparable.

An interrupted check goes on where it was, and a later one decodes changed files only. Exit status: 0 nothing is wrong,
1 something is, 2 wrong usage.
"""

import collections
import dataclasses
import os
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli, files, parallel
from common.data import audit, audit_report
from common.errors import UserError
from common.progress import Progress

_SHOWN = 10  # findings of a kind that are printed; the list holds all
_FIRST_LINE = "# Images to leave out, found by tools/check_data.py in "


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Options of this program."""

    list: str = cli.option("exclude.txt", "file to write the images to leave out to")
    workers: int = cli.option(0, "processes that decode; 0 is one per core", "-j", low=0)
    max_imbalance: float = cli.option(10.0, "how many times the smallest class the largest may be", low=1)

    def __post_init__(self):
        cli.check_ranges(self)


def examine_all(store, workers):
    """Bring the store up to date; returns how many files were new or changed."""
    total, new = store.count(), 0
    if not total:
        return 0
    try:
        with Progress(total, "files") as advance:
            for tasks in store.tasks():
                for results in parallel.unordered(audit.examine_many, tasks, workers, audit.ignore_interrupt):
                    new += store.learn(results)
                    advance(len(results))
    except KeyboardInterrupt:
        print("stopped; the same command goes on here", file=sys.stderr)
        raise
    finally:
        store.save()
    return new


def check_list_file(path):
    """Raise UserError where the list would overwrite something else."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise UserError(f"--list: {path} is a folder, or in none that exists")
    if not os.access(folder, os.W_OK):
        raise UserError(f"--list: {folder} cannot be written; name a file elsewhere")
    if os.path.exists(path):
        with open(path, "rb") as file:
            if not file.read(len(_FIRST_LINE)) == _FIRST_LINE.encode():
                raise UserError(f"--list: {path} exists and is no list of this program; choose another name")


def write_list(path, root, found):
    """Write every finding: images to leave out as entries, everything else as comments. Returns {kind: [Finding]} with
    the first ones of each kind, their counts, and the number of entries."""
    first, counts, entries = collections.defaultdict(list), collections.Counter(), 0
    with files.atomic_path(path) as draft, open(draft, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"{_FIRST_LINE}{os.path.abspath(root)}: path, tab, reason\n")
        for finding in found:
            counts[finding.kind] += 1
            if counts[finding.kind] <= _SHOWN:
                first[finding.kind].append(finding)
            entries += finding.exclude
            comment = "" if finding.exclude else "# "
            file.write(f"{comment}{finding.path}\t{finding.kind}: {' '.join(finding.reason.split())}\n")
    return first, counts, entries


def print_findings(first, counts):
    """The first findings of each kind, wrong ones before odd ones."""
    for kind in sorted(first, key=lambda kind: (first[kind][0].is_note, kind)):
        print(f"{'note: ' * first[kind][0].is_note}{kind}: {counts[kind]}")
        for finding in first[kind]:
            print(f"  {finding.path}: {finding.reason}")
        if counts[kind] > len(first[kind]):
            print(f"  ... {counts[kind] - len(first[kind])} more")


def print_part(store, part):
    """One line on a split."""
    sizes = list(audit_report.class_sizes(store, part).values())
    name = f"{part.name or 'images'}: {sum(sizes)} images that decode"
    if part.classes is None:
        print(f"{name}, labels in val_label.txt")
    else:
        print(f"{name} in {len(sizes)} classes of {min(sizes)} to {max(sizes)}, median {statistics.median(sizes):g}")


def main():
    parser = cli.parser_for(CheckConfig(), __doc__)
    parser.add_argument("folder", metavar="DIR", help="dataset root")
    given = vars(parser.parse_args())
    folder, config = given.pop("folder"), CheckConfig(**given)
    if not os.path.isdir(folder):
        raise UserError(f"DIR: {folder} is not a folder")
    check_list_file(config.list)
    store = audit.Store(folder)
    try:
        parts = store.list_files()
        new = examine_all(store, config.workers)
        print(f"{store.count()} files, {new} of them new or changed since the last check")
        for part in parts:
            print_part(store, part)
        first, counts, entries = write_list(config.list, folder, audit_report.find(store, parts, config.max_imbalance))
    finally:
        store.close()
    print_findings(first, counts)
    wrong = sum(count for kind, count in counts.items() if not first[kind][0].is_note)
    if entries:
        print(f"{config.list}: {entries} images to leave out, with --exclude={config.list}")
    print(f"{wrong} findings, {sum(counts.values()) - wrong} notes" if counts else "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    with cli.exit_on_error():
        sys.exit(main())
