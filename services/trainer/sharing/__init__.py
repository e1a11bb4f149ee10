"""Several nodes share their weights.

runner     orders what is decided
average    weights are averaged every few batches; pure
allreduce  gradients are averaged at each step; pure
decisions  what can be decided for several nodes at once; pure
"""
