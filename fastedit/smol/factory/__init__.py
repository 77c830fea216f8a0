"""How the embedded model is made: a vision tower that learns names, then learns to speak through the language model."""
