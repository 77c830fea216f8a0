"""VLKEB: MMEdit's 11 fields about Freebase entities, and `port_new` for portability.

Huang et al., "VLKEB: A Large Vision-Language Model Knowledge Editing Benchmark", arXiv 2403.07350. `port_new` comes
in two shapes, both asked about the edit's own image:

* one-hop edits: {port_edit_q, port_edit_a, port_q, port_a}. The first pair is a text fact that VLKEB also edits;
  it is checked here and is not part of the request.
* multi-hop: {port_type: "1-hop" to "4-hop", "Q&A": {Question, Answer}}.

The text-locality question has no prefix here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fastedit.data import mmedit
from fastedit.data.fields import Fields
from fastedit.data.problems import Collector
from fastedit.data.schema import read_request as _read
from fastedit.requests import EditRequest, Query, VisualSource

PORT_TYPES = ("1-hop", "2-hop", "3-hop", "4-hop")
SCHEMA = dataclasses.replace(mmedit.SCHEMA, format="vlkeb", extra=("port_new",), needs_image=True)


def read_request(fields: Fields, name: str) -> EditRequest | None:
    """Return the request of one VLKEB record, or None after reporting what is wrong with it."""
    # A bad image path is reported by the common reader; the queries are then never used.
    apart = Fields(fields.record, fields.value, Collector(""))
    about = apart.image("image")
    return _read(fields, SCHEMA, name, tuple(_portability(fields, about)))


def _portability(fields: Fields, image: VisualSource | None) -> Iterator[Query]:
    for member in fields.members("port_new"):
        if "port_type" in member.value or "Q&A" in member.value:
            query = _multi_hop(member, image)
        else:
            query = _one_hop(member, image)
        if query is not None:
            yield query


def _one_hop(member: Fields, image: VisualSource | None) -> Query | None:
    for key in ("port_edit_q", "port_edit_a"):
        member.text(key, required=True)
    prompt = member.text("port_q", required=True)
    answer = member.text("port_a", required=True, strip=True)
    member.unknown(("port_edit_q", "port_edit_a", "port_q", "port_a"))
    return None if prompt is None or member.failed else Query(prompt, image, answer, "1-hop")


def _multi_hop(member: Fields, image: VisualSource | None) -> Query | None:
    kind = member.text("port_type", required=True)
    if kind is not None and kind not in PORT_TYPES:
        member.problem(f"must be one of {', '.join(PORT_TYPES)}", "port_type", kind)
    member.unknown(("port_type", "Q&A"))
    inner = member.inner("Q&A")
    if inner is None:
        return None
    prompt = inner.text("Question", required=True)
    answer = inner.text("Answer", required=True, strip=True)
    inner.unknown(("Question", "Answer"))
    member.failed = member.failed or inner.failed
    return None if prompt is None or kind is None or member.failed else Query(prompt, image, answer, kind)
