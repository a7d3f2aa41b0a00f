"""Search with an encoder: vectors, exact nearest neighbours, metrics, hard negatives."""
