"""Stands in for the front end of Ascend/tools, 2023: underscores, switches with values, any path."""
