"""A program of somebody else: transformers and peft, and a checkpoint and an adapter in folders. Not fastedit.

Arguments: checkpoint, adapter, JSON of questions ({"prompt", "image": path or None}), file for logits. It writes a JSON
of answers, "base" and "edited".
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def main(checkpoint, adapter, questions, logits_file):
    asked = json.loads(Path(questions).read_text())
    images = any(question["image"] for question in asked)
    processor = (AutoProcessor if images else AutoTokenizer).from_pretrained(checkpoint)
    maker = AutoModelForImageTextToText if images else AutoModelForCausalLM
    model = maker.from_pretrained(checkpoint, dtype="auto").eval()
    inputs = [
        processor(
            **({"images": Image.open(question["image"])} if question["image"] else {}),
            text=question["prompt"],
            return_tensors="pt",
        )
        for question in asked
    ]
    tokenizer = processor.tokenizer if images else processor
    found, logits = {}, {}
    for name in ("base", "edited"):
        if name == "edited":
            model = PeftModel.from_pretrained(model, adapter).eval()
        found[name] = []
        for number, given in enumerate(inputs):
            given.pop("token_type_ids", None)
            ids = model.generate(**given, do_sample=False, max_new_tokens=8)
            new = ids[0, given["input_ids"].shape[1] :]
            found[name].append(tokenizer.decode(new, skip_special_tokens=True).strip())
            with torch.no_grad():
                logits[f"{name}.{number}"] = model(**given).logits[0, -1].contiguous()
    save_file(logits, logits_file)
    assert "fastedit" not in sys.modules
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
