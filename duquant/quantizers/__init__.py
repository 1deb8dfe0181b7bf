"""Affine grids, weight rounding and clipping, the KV cache quantizer, and packing of codes into int32 words."""
