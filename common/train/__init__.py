"""Losses, schedules, optimiser, EMA, checkpoints, reports and the trainer that joins them."""
