"""The encoder and decoder of MaskGIT's VQGAN."""
