"""Devices: the only package that names npu, cuda and apex."""
