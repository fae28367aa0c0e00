import argparse

import front_end

parser = argparse.ArgumentParser()
for name in ("--input", "--output", "--output_dirname", "--dymHW"):
    parser.add_argument(name)
parser.add_argument("--model", "-m", required=True)
parser.add_argument("--device", "-d", default="0")
parser.add_argument("--outfmt", default="BIN", choices=["NPY", "BIN", "TXT"])
parser.add_argument("--pure_data_type", default="zero", choices=["zero", "random"])
for name, default in (("--loop", 1), ("--batchsize", None), ("--dymBatch", 0), ("--warmup_count", 1)):
    parser.add_argument(name, type=int, default=default)

if __name__ == "__main__":
    front_end.main(parser.parse_args(), front_end.Style(False, True, "device{device}", False, "percentile(99%)"))
