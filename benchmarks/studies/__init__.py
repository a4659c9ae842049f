"""Training studies: small models trained on real images, with results reported as they are."""
