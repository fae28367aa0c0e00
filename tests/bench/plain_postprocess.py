"""Baseline of postprocess.py: one file after the other with split, float and a sort.

python tests/bench/plain_postprocess.py RESULT_FOLDER LABEL_FILE
"""

import os
import sys


def main(results, label_file):
    with open(label_file) as file:  # noqa: PTH123
        labels = {line.split()[0].split(".")[0]: int(line.split()[1]) for line in file}
    hits = [0] * 5
    names = sorted(os.listdir(results))  # noqa: PTH208
    for name in names:
        with open(f"{results}/{name}") as file:  # noqa: PTH123
            scores = [float(word) for word in file.readline().split()]
        label = labels[name.split(".")[0].rsplit("_", 1)[0]] + len(scores) - 1000
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        for k in range(5):
            hits[k] += label in order[: k + 1]
    print(*(f"top{k + 1} {hits[k]} of {len(names)}" for k in range(5)))


if __name__ == "__main__":
    main(*sys.argv[1:])
