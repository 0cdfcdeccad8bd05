"""Pictures and words -> what a pass of the model reads."""
