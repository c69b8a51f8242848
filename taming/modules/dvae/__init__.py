"""The discrete VAE of DALL-E (Ramesh et al. 2021): networks, likelihood and relaxation."""
