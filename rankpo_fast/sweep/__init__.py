"""Many trainings from one file: a grid of settings, chosen on validation, compared on both axes."""
