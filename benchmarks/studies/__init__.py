"""Training studies: what comes out when small models are trained on real images, whichever way it comes out."""
