"""Fitting: views of an edit, their rows on the frozen model, and the solver that steps many edits at once."""
