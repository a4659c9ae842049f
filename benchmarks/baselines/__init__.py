"""What dcdit is timed against, on the same inputs and in the same run."""
