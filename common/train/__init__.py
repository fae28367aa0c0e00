"""The trainer: losses, schedules, optimizers, checkpoints, run log."""
