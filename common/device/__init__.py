"""Devices: the only room that knows npu, cuda and apex."""
