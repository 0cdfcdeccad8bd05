"""Whole runs: what the command line and the nodes share."""
