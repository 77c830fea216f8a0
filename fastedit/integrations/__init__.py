"""Where fastedit meets the trainers of others; each module imports its package when it is imported itself."""
