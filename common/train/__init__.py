"""Losses, schedules, optimizer, EMA, checkpoints, reports and the trainer that joins them."""
