"""Find what is wrong with a dataset before a training does.

    python tools/check_data.py /data/imagenet

Checks every image below DIR, which holds train/ and val/ (class folders; or a flat val/ beside val_label.txt), or class
folders itself. Reports files that are empty, broken or have too many pixels to be decoded; copies within training, and
of validation images in training; classes of very different size, without images, or unknown to training. Writes a list
of the images to leave out, for `train.py --exclude FILE` and `eval.py --exclude FILE`. Images of validation are in it
only where they do not decode, so that accuracies stay comparable.

An interrupted check continues where it stopped, and a later one decodes changed files only. Exit status: 0 nothing is
wrong, 1 something is, 2 wrong usage.
"""

import collections
import dataclasses
import os
import pathlib
import statistics
import sys
from collections.abc import Iterable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli, files, parallel
from common.data import audit, audit_report, exclude, labels
from common.errors import UserError
from common.progress import Progress

SHOWN = 10  # findings of a kind that are printed; the list holds all
_FIRST_LINE = "# Images to leave out, found by tools/check_data.py in "

Findings = dict[str, list[audit_report.Finding]]


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Options of this program."""

    list: str = cli.option("exclude.txt", "file to write the images to leave out to")
    workers: int = cli.option(0, "processes that decode; 0 is one per core", "-j", low=0)
    label_numbers: str = labels.numbers_option()
    max_imbalance: float = cli.option(10.0, "how many times the smallest class the largest may be", low=1)

    def __post_init__(self) -> None:
        cli.check_ranges(self)


def examine_all(store: audit.Store, workers: int) -> int:
    """Check the files; returns how many were new or changed."""
    total, new = store.num_files(), 0
    if not total:
        return 0
    try:
        with Progress(total, "files") as advance:
            for tasks in store.tasks():
                for results in parallel.imap_unordered(audit.examine_many, tasks, workers):
                    new += store.update(results)
                    advance(len(results))
    except KeyboardInterrupt:
        print("stopped; the same command continues here", file=sys.stderr)
        raise
    finally:
        store.commit()
    return new


def check_list_file(path: str) -> None:
    """Raise UserError where the list would overwrite another file."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            if not file.read(len(_FIRST_LINE)) == _FIRST_LINE.encode():
                raise UserError(f"--list: {path} exists and is no list of this program; choose another name")


def write_list(
    path: str, root: str, found: Iterable[audit_report.Finding]
) -> tuple[Findings, collections.Counter[str], int]:
    """Write images to leave out as entries, other findings as comments.

    Returns:
      The first findings of each kind, the number of findings of each kind, and the number of entries.
    """
    first: Findings = collections.defaultdict(list)
    counts: collections.Counter[str] = collections.Counter()
    entries = 0
    with files.atomic_path(path) as draft, open(draft, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"{_FIRST_LINE}{os.path.abspath(root)}: path, tab, reason\n")
        for finding in found:
            if not exclude.can_hold(finding.path):
                if finding.exclude:
                    reason = f"{finding.reason}; --exclude cannot name this file, rename or remove it"
                    finding = finding._replace(reason=reason, exclude=False)
                finding = finding._replace(path=ascii(finding.path))
            counts[finding.kind] += 1
            if counts[finding.kind] <= SHOWN:
                first[finding.kind].append(finding)
            entries += finding.exclude
            comment = "" if finding.exclude else "# "
            file.write(f"{comment}{finding.path}\t{finding.kind}: {' '.join(finding.reason.split())}\n")
    return first, counts, entries


def print_findings(first: Findings, counts: collections.Counter[str]) -> None:
    """Print the first findings of each kind, errors before notes."""
    for kind in sorted(first, key=lambda kind: (first[kind][0].is_note, kind)):
        print(f"{'note: ' * first[kind][0].is_note}{kind}: {counts[kind]}")
        for finding in first[kind]:
            print(f"  {finding.path}: {finding.reason}")
        if counts[kind] > len(first[kind]):
            print(f"  ... {counts[kind] - len(first[kind])} more")


def print_split(store: audit.Store, split: audit.Split) -> None:
    """Print one line about a split."""
    sizes = list(audit_report.class_sizes(store, split).values())
    name = f"{split.name or 'images'}: {sum(sizes)} images that decode"
    if split.classes is None:
        print(f"{name}, labels in val_label.txt")
    else:
        print(f"{name} in {len(sizes)} classes of {min(sizes)} to {max(sizes)}, median {statistics.median(sizes):g}")


def main() -> int:
    parser = cli.parser_for(CheckConfig(), __doc__)
    parser.add_argument("folder", metavar="DIR", help="dataset root")
    given = vars(parser.parse_args())
    folder, config = given.pop("folder"), CheckConfig(**given)
    if not os.path.isdir(folder):
        raise UserError(f"DIR: {folder} is not a folder")
    with files.claimed_file(config.list, "--list"):
        check_list_file(config.list)
        return check(folder, config)


def check(folder: str, config: CheckConfig) -> int:
    """Check a data set, write the list and print what was found; returns the exit status."""
    store = audit.Store(folder)
    try:
        splits = store.list_files()
        new = examine_all(store, config.workers)
        print(f"{store.num_files()} files, {new} of them new or changed since the last check")
        for split in splits:
            print_split(store, split)
        found = audit_report.find(store, splits, config.max_imbalance, config.label_numbers)
        first, counts, entries = write_list(config.list, folder, found)
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
