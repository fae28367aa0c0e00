"""Fixtures of the deployment tests; what they stand on is in deployment.py."""

from deployment import chain, fake_tools, photos

__all__ = ["chain", "fake_tools", "photos"]
