"""Models that are made up: shapes, random weights, skeletons without weights, processors without files."""
