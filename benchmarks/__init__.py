"""The throughput harness; see README.md beside this file."""
