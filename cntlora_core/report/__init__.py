"""PNGs of losses, ranks and samples."""
