"""Stands in for an argparse front end of 2024 to 2026: underscores, switches with values, strict paths."""
