import argparse

import front_end
from front_end import READ, WRITE, path_type

ERROR = argparse.ArgumentTypeError
parser = argparse.ArgumentParser()
parser.add_argument("--model", "-m", type=path_type(ERROR, READ), required=True)
parser.add_argument("--input", "-i", type=path_type(ERROR, READ, split=True))
for name in ("--output", "--output_dirname"):
    parser.add_argument(name, type=path_type(ERROR, WRITE, must_exist=False))
parser.add_argument("--device", "-d", default="0")
parser.add_argument("--outfmt", default="BIN", choices=["NPY", "BIN", "TXT"])
parser.add_argument("--pure_data_type", default="zero", choices=["zero", "random"])
parser.add_argument(
    "--divide_input",
    type=lambda text: text.lower() in ("1", "true", "yes"),
    default=False,
    help="Input datas need to be divided to match multi devices or not, --device should be list, default False",
)
for name, default in (("--loop", 1), ("--batchsize", None), ("--dymBatch", 0), ("--warmup_count", 1)):
    parser.add_argument(name, type=int, default=default)

if __name__ == "__main__":
    front_end.main(
        parser.parse_args(), front_end.Style(True, False, "device{device}_{index}", False, "percentile(99%)")
    )
