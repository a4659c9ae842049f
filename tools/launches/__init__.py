"""What each kernel family starts, for the ahead-of-time check."""
