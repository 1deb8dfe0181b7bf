"""The transform of a site: smoothing, rotation R1, permutation P, rotation R2, and how it meets the weights."""
