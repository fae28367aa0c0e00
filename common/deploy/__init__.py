"""From a checkpoint to scored results: export, preprocessing, atc, ais_bench, postprocessing."""
