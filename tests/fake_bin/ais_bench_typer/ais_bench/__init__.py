"""Stands in for the typer front end of 2026: hyphens, switches without values, strict paths, a drawn help."""

from ais_bench.infer import interface as interface  # as the real one: without aclruntime not even --help works
