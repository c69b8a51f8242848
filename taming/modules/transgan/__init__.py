"""TransGAN: a generator and a discriminator made of transformers alone."""
