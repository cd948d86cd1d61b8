"""A learned world you can step into: a causal normalizing flow over video behind the Gymnasium API."""
