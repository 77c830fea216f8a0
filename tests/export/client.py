"""A program that knows nothing of fastedit: asks a checkpoint questions through transformers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastedit.backbone import EditableModel
from fastedit.requests import Query, images_of
from tests.programs import OTHERS, host

_PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from PIL import Image
import torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, pipeline
transformers.utils.logging.set_verbosity_error()
folder, asked = sys.argv[1], json.load(open(sys.argv[2]))
processor = AutoProcessor.from_pretrained(folder)
sees = hasattr(transformers.AutoConfig.from_pretrained(folder), "vision_config")
auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
model = auto.from_pretrained(folder)
answers = []
for question in asked:
    images = [Image.open(path).convert("RGB") for path in question["images"]]
    bare = {"add_special_tokens": question["opens"]}
    inputs = processor(text=[question["text"]], return_tensors="pt", **({"images": images} if images else {}), **bare)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    # Models that are fed embeddings give the new tokens alone
    start = inputs["input_ids"].shape[1] if ids.shape[1] > inputs["input_ids"].shape[1] else 0
    text = getattr(processor, "tokenizer", processor).decode(ids[0, start:], skip_special_tokens=True)
    answers.append(text.strip())
piped = None
if sees and asked[0]["images"] and getattr(processor, "chat_template", None):
    ask = pipeline("image-text-to-text", model=folder)
    image = Image.open(asked[0]["images"][0]).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": asked[0]["prompt"]}]
    messages = [{"role": "user", "content": content}]
    out = ask(text=messages, return_full_text=False, generate_kwargs={"do_sample": False, "max_new_tokens": 12})
    piped = out[0]["generated_text"].strip()
assert "fastedit" not in sys.modules
print(json.dumps({"answers": answers, "piped": piped, "dtype": str(model.dtype)}))
"""


def ask_client(model: EditableModel, folder: Path, queries: Sequence[Query], work: Path) -> dict[str, Any]:
    """What a fresh process answers that loads the checkpoint: "answers", "piped" by a pipeline to the first, "dtype".

    Args:
        model: whose way of asking is taken. folder: the checkpoint. work: for files.
    """
    from fastedit.data.images import open_image

    asked = []
    for number, query in enumerate(queries):
        images = []
        for source in images_of(query.image):
            path = work / f"asked-{number}-{len(images)}.png"
            open_image(source).save(path)
            images.append(str(path))
        text = model.prompts.text(query.prompt, bool(images))
        opening = model.tokenizer.bos_token or "\0"
        opens = not text.startswith(opening)
        asked.append({"text": text, "prompt": query.prompt, "images": images, "opens": opens})
    file = work / "asked.json"
    file.write_text(json.dumps(asked))
    done = host(OTHERS).run(_PROGRAM, folder, file, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
