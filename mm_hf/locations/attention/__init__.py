"""Attention weights of an unmodified model, whatever computes them.

functions.py   the functions that compute attention in Transformers, and a mode that watches PyTorch's own
recording.py   in the probe: every call that computes attention
selection.py   in the probe: which of these calls and which of its queries weigh the labels
hook.py        in training: the chosen row of the chosen call, without the cost of the others
weights.py     rows of attention computed from query and keys, and the other kinds of confidence
"""
