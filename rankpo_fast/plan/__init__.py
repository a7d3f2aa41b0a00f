"""What a training will take of a GPU's memory and time, counted before any weight is loaded."""
