"""Stands in for Ascend's inference tool of this name; see __main__.py."""
