"""The DreamBooth loop, its state, and what it takes."""
