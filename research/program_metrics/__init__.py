"""Random JAX programs and what they cost: a data set that anybody can measure.

`grammar` writes programs, `measure` compiles and times one, `collect` does so
with many on all cores, and `dataset` removes duplicates and splits.
"""
