"""Lists of objects as token sequences that a transformer is conditioned on, and images of them."""
