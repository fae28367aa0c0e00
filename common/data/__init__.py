"""Folder index, decoding, transforms, order and loader: everything between files and batches."""
