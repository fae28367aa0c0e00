"""Launchers: configuration checks, machines, torchrun's agent, restarts, preflight."""
