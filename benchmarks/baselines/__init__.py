"""What the engine is compared with: one edit at a time, the way existing toolkits and libraries do it."""
