"""Renders the aggregation prompts. The wording is in `prompts/`; here are the fence and the candidates' places."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from harness.lineage import seed_of
from harness.types import Message, Problem, Tail

_FENCE = re.compile(r"(?=(={5}[0-9a-f]{16}={5}))")  # ahead, since two fences may share their bars
_NAMES = ("aggregate.md.j2", "refine.md.j2")


@dataclass(frozen=True, slots=True)
class Templates:
    """The wording of a run: `aggregate` for several candidates, `refine` for one; `digest` names it in the log."""

    aggregate: Template = field(repr=False)
    refine: Template = field(repr=False)
    digest: str


def load_templates(folder: Path | None = None) -> Templates:
    """Load the wording from a folder, by default the one that is shipped.

    Raises:
        FileNotFoundError: If one of the two files is missing.
    """
    if folder is None:
        packaged = Path(__file__).parent / "templates"
        folder = packaged if packaged.is_dir() else Path(__file__).parent.parent / "prompts"
    sources = [(folder / name).read_bytes() for name in _NAMES]
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=False,  # a prompt is no page
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return Templates(
        aggregate=environment.get_template(_NAMES[0]),
        refine=environment.get_template(_NAMES[1]),
        digest=hashlib.sha256(b"\0".join(sources)).hexdigest()[:16],
    )


def fence_of(seed: int, round: int, texts: Sequence[str]) -> str:
    """The line that stands before and after each candidate of a round.

    A rollout can only have seen the fences of rounds before its readers', so it cannot write its own end; should the
    line stand in some text all the same, the next of its stream is taken.
    """
    taken = {found for text in texts for found in _FENCE.findall(text)}
    attempt = 0
    while (fence := f"====={seed_of(seed, 'fence', round, attempt):016x}=====") in taken:
        attempt += 1
    return fence


def aggregation_messages(
    templates: Templates, problem: Problem, tails: Sequence[Tail], seed: int, round: int
) -> tuple[Message, ...]:
    """The conversation with its last user turn replaced by the aggregation prompt over it.

    Every other turn stands as it was. Where the last turn is no user's, the prompt is a turn of its own.

    Args:
        templates: The wording.
        problem: The conversation.
        tails: The candidates, in the order of their set.
        seed: The run's.
        round: The round whose rollout reads this.

    Raises:
        ValueError: If there is no candidate.
    """
    if not tails:
        raise ValueError("an aggregation prompt needs at least one candidate")
    *before, last = problem.messages
    is_user = last.role == "user"
    task = last.text if is_user else None
    fence = fence_of(seed, round, [*(message.text for message in problem.messages), *(tail.text for tail in tails)])
    places = [f"{fence}:{number}:" for number in range(len(tails))]
    template = templates.refine if len(tails) == 1 else templates.aggregate
    text = template.render(
        task=task,
        fence=fence,
        candidates=places,
        boxed=any("boxed" in message.text for message in problem.messages if message.role != "assistant"),
    )
    # The places are split out again, so that a candidate's own ids can stand there.
    content: list[str | Tail] = []
    for place, tail in zip(places, tails, strict=True):
        before_it, _, text = text.partition(place)
        content += (before_it, tail)
    content.append(text)
    prompt = Message("user", tuple(content), name=last.name if is_user else None)
    return (*before, prompt) if is_user else (*problem.messages, prompt)
