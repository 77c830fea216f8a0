"""Names of the model and of the edit sets; apart, so that asking for them imports nothing."""

MODEL = "smol-llava"
SETS = ("icon-entity", "icon-vqa", "icon-caption")
