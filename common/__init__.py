"""What two or more models of the zoo share. Nothing in here names a model, and importing it does nothing."""
