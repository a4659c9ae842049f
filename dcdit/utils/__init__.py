"""What several packages need and none of them owns: atomic files, tables, images, the environment."""
