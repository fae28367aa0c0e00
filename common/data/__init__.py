"""File index, decoding, transforms, sampling order and loaders: from image files to uint8 batches."""
