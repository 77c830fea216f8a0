"""Edits of one run made by several processes, of this machine or of many."""
