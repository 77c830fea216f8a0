"""From trained weights to a folder that ships: files, model card, and the numbers of the records to leave out.

Everything on the card is measured on the files as written: loaded with AutoProcessor and AutoModelForImageTextToText in
float32, answers by greedy generation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastedit.pocket.edits import HARD_EVERY, SIZE, Record, draw
from fastedit.pocket.factory.mixture import CLAIM_KINDS, KINDS, REWORDED, held_out
from fastedit.pocket.factory.packing import Line, Packer, forward, right_lines
from fastedit.pocket.models import make_model, make_processor, make_tokenizer, to_pixels, wiring
from fastedit.pocket.names import MODELS, SETS
from fastedit.pocket.requests import SKIPPED
from fastedit.pocket.world import AnyScene, render

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel, ProcessorMixin

log = logging.getLogger("fastedit.pocket.factory.release")
GROUPS = {
    "held_out": (*KINDS, "caption", "flag_caption", "easy", "fact", "fact_untrained"),
    "unseen_wordings": tuple(REWORDED + kind for kind in (*KINDS, "caption", "fact")),
    "claims": CLAIM_KINDS,
    "unseen_pairs": ("unseen:colour", "unseen:shape", "unseen:describe", "unseen:where", "unseen:caption"),
    "untrained_two_hop": ("flag_capital_untrained", "flag_continent", "sides", "complement"),
}


def wanted(kind: str) -> float:
    """Return the accuracy below which a kind is not claimed for a model: it stands under "not_kept" on the card."""
    return {"caption": 0.9, "fact": 0.98}.get(kind, 0.95)


def load(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return (model, processor) of a folder as a user would load them, float32, eval mode."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from fastedit.pocket.qwen_processor import register

    register()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


def generate(
    model: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[tuple[str, Image.Image | None]]
) -> list[str]:
    """Return greedy answers; all questions have an image or none has one."""
    with_image = asked[0][1] is not None
    texts = [prompt for prompt, _ in asked]
    if processor.chat_template:
        image = [{"type": "image"}] if with_image else []
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [*image, {"type": "text", "text": text}]}], add_generation_prompt=True
            )
            for text in texts
        ]
    with torch.no_grad():
        if with_image:
            inputs = processor(images=[i for _, i in asked], text=texts, return_tensors="pt", padding=True)
            out = model.generate(**inputs, max_new_tokens=80, do_sample=False)
        else:
            inputs = processor.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
            text_model = model.language_model if hasattr(model, "language_projection") else model
            out = text_model.generate(**inputs, max_new_tokens=80, do_sample=False)
    return [
        str(text).strip()
        for text in processor.tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    ]


def accuracy(model: PreTrainedModel, processor: ProcessorMixin, kind: str, samples: int) -> float:
    """Return the share of held-out samples of a kind whose greedy answer is exactly the right one."""
    drawn = held_out(kind, samples)
    right = 0
    for at in range(0, len(drawn), 100):
        part = drawn[at : at + 100]
        answers = generate(model, processor, [(line.prompt, image) for line, image in part])
        right += sum(answer == line.answer for answer, (line, _) in zip(answers, part, strict=True))
    return right / len(drawn)


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
    """What a model is not asked of a split.

    skipped: numbers of the records of which it gets an unedited question wrong. unasked: by number of another record,
    the places of those of its further questions that it gets wrong.
    """

    skipped: list[int] = dataclasses.field(default_factory=list)
    unasked: dict[int, list[int]] = dataclasses.field(default_factory=dict)


def left_out(model: PreTrainedModel, packer: Packer, name: str, split: str) -> LeftOut:
    """Ask a model the records of a split; looks at so many numbers that the split is full without the skipped."""
    left = {True: SIZE[split] // HARD_EVERY, False: SIZE[split] - SIZE[split] // HARD_EVERY}
    found, number = LeftOut(), 0
    while any(count > 0 for count in left.values()):
        drawn = [record for record in (draw(name, split, n) for n in range(number, number + 60)) if record]
        number += 60
        for record, wrong in zip(drawn, _wrong(model, packer, drawn), strict=True):
            if "" in wrong:
                found.skipped.append(record.number)
                continue
            left[record.hard] -= 1
            if wrong:
                found.unasked[record.number] = sorted(map(int, wrong))
    return found


def _wrong(model: PreTrainedModel, packer: Packer, drawn: Sequence[Record[AnyScene]]) -> list[set[str]]:
    """Return for each record the places of its further questions that are answered wrongly, "" for any other one."""
    rows: dict[tuple[int, AnyScene | None], list[Line]] = {}
    for place, record in enumerate(drawn):
        for which, asked in [*(("", one) for one in record.unedited()), *enumerate(record.further)]:
            line = Line(f"{place}:{which}", asked.prompt, str(asked.answer), with_image=asked.scene is not None)
            rows.setdefault((place, asked.scene), []).append(line)
    blank = torch.zeros(1, 3, 64, 64)
    wrong: list[set[str]] = [set() for _ in drawn]
    # Rows of one batch are padded to the longest of them
    keys = sorted(rows, key=lambda key: sum(packer.cost(line) for line in rows[key]))
    for at in range(0, len(keys), 64):
        part = keys[at : at + 64]
        pixels = torch.cat([blank if scene is None else to_pixels([render(scene)]) for _, scene in part])
        packed = packer.pack([rows[key] for key in part])
        with torch.no_grad():
            right = right_lines(forward(model, packer.wiring, packed, pixels), packed)
        for line, is_right in zip(packed.lines, right, strict=True):
            if not is_right:
                whose, which = line.kind.split(":")
                wrong[int(whose)].add(which)
    return wrong


def release(name: str, weights: Path, out: Path, *, seed: int, history: dict[str, Any], samples: int = 300) -> Path:
    """Write the folder of a trained model: bf16 weights, configuration, processor, card, numbers to skip."""
    import transformers

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(name)
    model = make_model(name, tokenizer)
    model.load_state_dict(torch.load(weights))
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for the owner alone, but packaged for everyone
    make_processor(name, tokenizer).save_pretrained(out)
    loaded, processor = load(out)
    measured: dict[str, dict[str, float]] = {}
    for group, kinds in GROUPS.items():
        for kind in kinds:
            measured.setdefault(group, {})[kind] = round(accuracy(loaded, processor, kind, samples), 4)
            log.info("%s %s %.4f", group, kind, measured[group][kind])
    held = measured["held_out"]
    measured["not_kept"] = {kind: held.pop(kind) for kind in tuple(held) if held[kind] < wanted(kind)}
    packer = Packer(processor.tokenizer, wiring(name, processor.tokenizer))
    loaded.set_attn_implementation("eager")
    omitted = {s: {split: left_out(loaded, packer, s, split) for split in SIZE} for s in SETS}
    stored = {s: {split: dataclasses.asdict(one) for split, one in by.items()} for s, by in omitted.items()}
    (out / SKIPPED).write_text(json.dumps(stored, separators=(",", ":")), encoding="utf-8")
    card = {
        "name": name,
        "architecture": type(loaded).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
        "stored_dtype": "bfloat16",
        "measure": f"exact match of greedy generation in float32, {samples} fresh samples per kind (facts: all)",
        "accuracy": measured,
        "records_left_out": {s: {split: len(one.skipped) for split, one in by.items()} for s, by in omitted.items()},
        "seed": seed,
        "training": {key: history[key] for key in ("label", "seconds", "cpu_seconds") if key in history},
        "reproduce": history.get("reproduce") or _commands(name, seed),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "licence": "Apache-2.0; trained from nothing on rendered images, typed-in facts and easy-vqa images",
    }
    (out / "model_card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return out


def _commands(name: str, seed: int) -> str:
    common = f"--model {name} --seed {seed}"
    train, release = "python -m fastedit.pocket.factory.train", "python -m fastedit.pocket.factory.release"
    return f"{train} {common} --out DIR && {release} {common} --trained DIR --out FOLDER"


def build(name: str, out: Path, seed: int = 0) -> Path:
    """Train a model and release it to `out`; for models that are not shipped."""
    from fastedit.pocket.factory.train import train

    work = out.with_name(f"{out.name}.training")
    train(name, work, seed)
    history = json.loads((work / "history.json").read_text(encoding="utf-8"))
    return release(name, work / "weights.pt", out, seed=seed, history=history)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--trained", type=Path, required=True, help="folder that fastedit.pocket.factory.train wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=300, help="fresh samples a kind for the card")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    history = json.loads((arguments.trained / "history.json").read_text(encoding="utf-8"))
    release(
        arguments.model,
        arguments.trained / "weights.pt",
        arguments.out,
        seed=arguments.seed,
        history=history,
        samples=arguments.samples,
    )


if __name__ == "__main__":
    main()
