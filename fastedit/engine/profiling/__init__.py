"""Where the time of a run goes: seconds by phase, necessary operations, and what the machine can do."""
