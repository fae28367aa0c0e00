import argparse
import os
import sys

import front_end
from front_end import READ, WRITE, path_type

OPTIONS = {  # option: (short option or negation, type column, help)
    "--model": ("-m", "<str>", "The path of the om model [required]"),
    "--input": ("-i", "<str>", "Input file or dir"),
    "--output": ("-o", "<str>", "Inference data output path. The results go to the subdirectory named current date"),
    "--output-dirname": ("", "<str>", "Actual output directory name. such as --output_dirname 'tmp'"),
    "--outfmt": ("", "<NPY|BIN|TXT>", "Output file format (NPY or BIN or TXT) [default: BIN]"),
    "--loop": ("-l", "<str>", "The round of the PureInfer. [default: 1]"),
    "--device": ("-d", "<str>", "The NPU device ID to use.valid value range is [0, 255] [default: 0]"),
    "--dymBatch": ("", "<int>", "Dynamic batch size param, such as --dymBatch 2 [default: 0]"),
    "--batchsize": ("", "<str>", "Batch size of input tensor"),
    "--pure-data-type": ("", "<zero|random>", "Null data type for pure inference(zero or random) [default: zero]"),
    "--warmup-count": ("", "<str>", "Warmup count before inference [default: 1]"),
    "--divide-input": ("--no-divide-input", "<bool>", "Input datas need to be divided [default: no-divide-input]"),
    "--help": ("", "<bool>", "Show this message and exit."),
}


def print_help():
    """Drawn as wide as COLUMNS; in 80, names of options are cut as the real one cuts them."""
    width = int(os.environ.get("COLUMNS", 80))
    print(f"\n Usage: python -m ais_bench [OPTIONS]\n\n╭─ Options {'─' * (width - 12)}╮")
    for name, (other, kind, text) in OPTIONS.items():
        if width < 120:
            name = name if len(name) < 15 else f"{name[:13]}…"
        line = f" {'*' if name == '--model' else ' '}  {name:<17}  {other:<19}  {kind:<15} {text}"
        print(f"│{line[: width - 2]:<{width - 2}}│")
    print(f"╰{'─' * (width - 2)}╯")


def usage_error(message):
    print(f"Usage: python -m ais_bench [OPTIONS]\n╭─ Error ─╮\n│ {message} │\n╰─────────╯", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        usage_error(message.replace("unrecognized arguments:", "No such option:"))


def main():
    if "--help" in sys.argv:
        return print_help()
    parser = Parser(allow_abbrev=False)
    for name, (other, kind, _) in OPTIONS.items():
        if kind == "<bool>":
            parser.add_argument(name, action="store_true") if name != "--help" else None
        else:
            choices = kind[1:-1].split("|") if "|" in kind else None
            parser.add_argument(name, *filter(None, [other]), choices=choices)
    args = parser.parse_args()
    for name, mode in (("model", READ), ("input", READ), ("output", WRITE), ("output_dirname", WRITE)):
        if value := getattr(args, name):  # a traceback and exit status 1
            path_type(argparse.ArgumentTypeError, mode, must_exist=mode == READ, split=name == "input")(value)
    args.dymBatch = int(args.dymBatch or 0)
    args.loop, args.warmup_count = int(args.loop or 1), int(args.warmup_count or 1)
    args.batchsize, args.device = int(args.batchsize or 0), args.device or "0"
    args.outfmt = args.outfmt or "BIN"
    return front_end.main(args, front_end.Style(True, False, "device{device}_{index}", True, "P99"))


if __name__ == "__main__":
    main()
