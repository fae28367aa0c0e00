"""Reading, converting and writing checkpoints of every known format."""
