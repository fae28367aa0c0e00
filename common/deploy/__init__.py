"""The chain from a checkpoint to scored results: export, preprocess, engines, scoring."""
