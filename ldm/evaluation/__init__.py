"""Whether a model draws what it is asked for."""
