"""How the embedded models are made: data, alignment, training, release."""
