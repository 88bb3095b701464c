"""The sides of the comparisons: ours import rlhf, peers import neither rlhf nor each other."""
