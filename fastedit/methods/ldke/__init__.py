"""The LDKE-style editor: fast localization and a disentanglement classifier."""
