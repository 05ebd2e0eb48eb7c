"""Sizes of blocks and rows that the code of networks agrees on."""

SAMPLES = 8
"""Samples of a block: they are unrolled together and share the weights that are loaded."""

FEW = 8
"""Most outputs of a last layer that is worth no register's width of outputs."""

PAD = 16
"""Widths of layers are padded to a multiple of this, as in native/layers.h."""

CHUNK_NUMBERS = 16384
"""Numbers of a flow's rows that a backward pass works on at a time: they stay in the second-level cache."""


def padded(n: int) -> int:
    """Return the width that n numbers take."""
    return -(-n // PAD) * PAD
