"""The losses: each module has QUESTIONS, whose inputs are made when a shape is asked."""
