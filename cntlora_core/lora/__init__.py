"""The adapter, which layers get one, and its file."""
