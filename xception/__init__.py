"""Xception: the network and its bindings to the shared parts."""
