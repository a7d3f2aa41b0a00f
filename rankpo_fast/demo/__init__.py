"""The demo: a synthetic job-talent world, and both stages of RankPO trained and measured on it."""
