"""The encoder and decoder of Open-MAGVIT2."""
