"""Prompts of a stock ``generate`` in which edits ask another question, and its answers to the prompts as given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel
from fastedit.backbone.encoding import padding_id
from fastedit.backbone.row_questions import RewrittenRow, rewrite_row
from fastedit.deltas import RowsHolder
from fastedit.deltas.install import PLACEHOLDER


class RewrittenPrompts:
    """The arguments of a ``generate`` with prompts in which deltas ask their own questions.

    Args:
        model: around the stock model. holder: of deltas that ask another question.
        chosen: by row the delta that asks, -1 for none. given: arguments by name, ``input_ids`` (R, N) among them.
    Raises:
        ValueError: no ids, or a prompt that the model's own template does not make.
    """

    def __init__(self, model: EditableModel, holder: RowsHolder, chosen: Sequence[int], given: dict[str, Any]) -> None:
        self.chosen, self.padding = list(chosen), padding_id(model)
        self.ids, self.mask = prompt_tokens(model, given)
        rows = []
        for row, edit in enumerate(self.chosen):
            tokens = self.ids[row][self.mask[row]].tolist()
            template = None if edit < 0 else holder.stacked.texts[edit].get("template")
            rows.append(_rewritten(model, tokens, template))
        self._rows = rows
        self.width = max(len(row.ids) for row in rows)
        self.given = self._arguments(model, given)

    def _arguments(self, model: EditableModel, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments with longer rows, padded on the left."""
        # Positions are counted anew
        found = {name: value for name, value in given.items() if name not in ("inputs", "position_ids")}
        found["input_ids"] = self._padded([torch.tensor(row.ids) for row in self._rows], self.padding, torch.long)
        found["attention_mask"] = self._padded([torch.ones(len(row.ids)) for row in self._rows], 0, torch.long)
        for name, value in given.items():
            if name in ("input_ids", "inputs", "attention_mask", "position_ids") or not isinstance(value, Tensor):
                continue
            if value.shape == self.ids.shape:
                # Of every token: what text has, and what tokens of images had
                parts = []
                for number, row in enumerate(self._rows):
                    before, (first, end) = value[number][self.mask[number]].cpu(), row.image
                    part = before[-1].repeat(len(row.ids))
                    part[first:end] = before[row.image_before : row.image_before + end - first]
                    parts.append(part)
                found[name] = self._padded(parts, 0, value.dtype)
        config = given.get("generation_config") or model.hf.generation_config
        longest = given.get("max_length", config.max_length)
        if given.get("max_new_tokens", config.max_new_tokens) is None and longest is not None:
            # A length counts the prompt as it was given
            found.pop("max_length", None)
            found["max_new_tokens"] = max(1, int(longest) - self.ids.shape[1])
        return found

    def _padded(self, rows: Sequence[Tensor], value: int, dtype: torch.dtype) -> Tensor:
        out = torch.full((len(rows), self.width), value, dtype=dtype)
        for number, row in enumerate(rows):
            out[number, self.width - len(row) :] = row.to(dtype)
        return out.to(self.ids.device)

    def answered(self, output: Any, base: Any = None) -> Any:
        """Return an output of ``generate`` with the prompts as they were given.

        Args:
            output: of the rewritten prompts. base: of the prompts as given by the base model, whose answers stand in
                rows where no delta asks; None where all do.
        """
        sequences = output if isinstance(output, Tensor) else output.sequences
        share = len(sequences) // len(self.chosen)
        prompts = self.given["input_ids"].repeat_interleave(share, 0)
        repeats_prompts = sequences.shape[1] >= self.width and torch.equal(sequences[:, : self.width], prompts)
        answers = sequences[:, self.width :] if repeats_prompts else sequences
        if base is not None:
            others = base if isinstance(base, Tensor) else base.sequences
            others = others[:, self.ids.shape[1] :] if repeats_prompts else others
            asks = torch.tensor(self.chosen, device=answers.device).repeat_interleave(share) >= 0
            most = max(answers.shape[1], others.shape[1])
            answers, others = (_widened(part, most, self.padding) for part in (answers, others))
            answers = torch.where(asks[:, None], answers, others)
        joined = torch.cat([self.ids.repeat_interleave(share, 0), answers], 1) if repeats_prompts else answers
        if isinstance(output, Tensor):
            return joined
        output["sequences"] = joined
        return output


def prompt_tokens(model: EditableModel, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids (R, N) of the arguments of a ``generate``, and which are no padding.

    Raises:
        ValueError: there are no ids.
    """
    ids = given.get("input_ids", given.get("inputs"))
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("attach: edits that ask another question need input_ids, (rows, tokens) (got none)")
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor):
        padding = model.tokenizer.pad_token_id
        # As generate tells padding where it is told nothing
        mask = ids != padding if padding is not None and padding not in model.end_token_ids else torch.ones_like(ids)
    return ids, mask.bool()


def _rewritten(model: EditableModel, tokens: list[int], template: str | None) -> RewrittenRow:
    if template is None:
        return RewrittenRow(tokens, (0, len(tokens)), 0)
    return rewrite_row(model, tokens, lambda question: template.replace(PLACEHOLDER, question))


def _widened(tokens: Tensor, width: int, padding: int) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=padding)
