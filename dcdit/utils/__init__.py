"""What several packages need and none of them owns: files and locks, tables, images, the environment."""
