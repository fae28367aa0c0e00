"""Inception v4: the network and its bindings to the shared parts."""
