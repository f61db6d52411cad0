"""How large what a file says may be: above what any model has, and below what would take minutes to find out.

Sizes are checked against the tensors of the file too; these bounds hold before that, and for computed values.
"""

MOST_LAYERS = 10_000
MOST_HEADS = 1 << 16
MOST_EXPERTS = 1 << 16
MOST_WIDTH = 1 << 24
"""Of hidden states, feed-forward layers, heads."""
MOST_VOCAB = 1 << 26
MOST_POSITIONS = 2**31 - 1
"""Positions are int32."""

EPS = (1e-20, 1.0)
"""Of a norm: 0 makes NaN of a row of zeros, and less than this is 0 where it is squared in float32."""
THETA = (1.0, 1e15)
"""Base of the rotary frequencies; below 1 they grow without bound."""
FACTOR = (1e-3, 1e6)
"""By which positions or frequencies are divided."""
SCALE = (1e-6, 1e6)
"""Other factors of rotary scaling."""
