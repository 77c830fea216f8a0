"""A program of somebody else: transformers and peft, and a checkpoint and an adapter in folders. Not fastedit.

Arguments: checkpoint, adapter, JSON of questions ({"prompt", "image": path or None}), file for logits. It writes a JSON
of answers: "base", "edited" by PEFT, "loaded" by transformers itself, and "piped" through its pipeline.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline


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
    edited = PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()
    loaded = copy.deepcopy(model)
    loaded.load_adapter(adapter)
    found, logits = {}, {}
    for name, each in (("base", model), ("edited", edited), ("loaded", loaded.eval())):
        found[name] = []
        for number, given in enumerate(inputs):
            given.pop("token_type_ids", None)
            ids = each.generate(**given, do_sample=False, max_new_tokens=8)
            new = ids[0, given["input_ids"].shape[1] :]
            found[name].append(tokenizer.decode(new, skip_special_tokens=True).strip())
            with torch.no_grad():
                logits[f"{name}.{number}"] = each(**given).logits[0, -1].contiguous()
    options = {"do_sample": False, "max_new_tokens": 8}
    if images:
        ask = pipeline("image-text-to-text", model=loaded, processor=processor)
        said = [ask(Image.open(q["image"]), text=q["prompt"], generate_kwargs=options) for q in asked]
        found["piped"] = [each[0]["generated_text"] for each in said]
    else:
        ask = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
        said = [ask(q["prompt"], return_full_text=False, **options) for q in asked]
        found["piped"] = [each[0]["generated_text"].strip() for each in said]
    save_file(logits, logits_file)
    assert "fastedit" not in sys.modules
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
