"""The module by which a front end with strict paths is known."""
