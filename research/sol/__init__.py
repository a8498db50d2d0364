"""SOL: a policy that chooses how much of a language model each token gets."""
