"""What a run needs of memory: counted before it, kept to while it runs, and halved where it runs out."""
