"""What several test files share: problems, references, bounds, ranks, and runs with few words."""
