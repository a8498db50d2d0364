"""What attention remembers of earlier tokens: one file a representation.

A cache is a pytree whose arrays have the layers as axis 0, so that a scan over
layers slices it. `attend(places)` gives the function that mixes heads: it reads
one layer's old keys and values, and returns those of the new tokens.
`append(new, places)` writes these after all layers have run, at once and in
place where the cache is donated.
"""
