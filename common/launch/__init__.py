"""Launchers: checks before a run, rendezvous of several nodes, torchrun's agent, restarts."""
