"""One file per reward."""
