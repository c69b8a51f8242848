"""Two-stage image synthesis: a VQGAN and a transformer over its codebook indices (Esser et al., 2021)."""

__version__ = "1.0.0"
