"""Training in little memory: what a pass keeps, where it can be cut, what is computed again, and running that."""
