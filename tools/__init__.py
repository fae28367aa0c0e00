"""Programs around the models."""
