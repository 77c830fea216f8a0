"""Names of what is embedded; apart, so that asking for them imports nothing."""

MODELS = ("pocket-llava", "pocket-blip2", "pocket-qwen2vl")
SETS = ("pocket-vqa", "pocket-caption")
