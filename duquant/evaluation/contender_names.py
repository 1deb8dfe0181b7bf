"""What the contenders of the kernel benchmark are called in results."""

BFLOAT16 = "bfloat16"
"""The unquantized model."""
RTN = "rtn"
"""INT4 without a transform."""
HADAMARD = "hadamard"
"""INT4 with a Hadamard matrix over all channels of every site, as the preset quarot has it.

QuaRot (arXiv 2404.00456v2) merges those before q, k, v and gate, up into the weights around them.
"""
DUQUANT = "duquant"
"""INT4 with R1, P, R2."""
ARTIFACT = "artifact"
"""An artifact whose activations keep 16 bits: the others say nothing of it."""
