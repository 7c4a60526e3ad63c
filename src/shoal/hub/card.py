"""The model card of a publication: metadata by huggingface_hub's own classes, and a body that claims what was shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.hub.item_file import FILE as ITEMS
from shoal.hub.licences import ADVICE, OWN_TEXT, Terms
from shoal.hub.lineage import drawn
from shoal.hub.parents import Parent, hub_ids
from shoal.hub.published import PublishedLock
from shoal.recipe import Recipe
from shoal.report import markdown_table, result_words
from shoal.sanity import PROMPTS, Written
from shoal.types import ROLES

TAGS = ("merge", "mergekit", "shoal")
RECIPE_TAG = "shoal-recipe"
SHOWN = (
    3,
    8,
    0,
    13,
    15,
)  # of the sanity guard's prompts, in this order; the first three whose answers may be shown
# a word of the Hub's badges for results that somebody else has measured
_NOT_OURS = re.compile("verif", re.IGNORECASE)


@dataclass(frozen=True)
class CardContent:
    """All that a card says. plots: names of the pictures that are there; written: what candidates wrote to the prompts;
    met: (task, role) -> different items that any candidate was scored on; included: names of further files."""

    repo: str
    weights: bool
    recipe: Recipe
    lock: PublishedLock
    result: Mapping[str, Any]
    parents: Sequence[Parent]
    terms: Terms
    languages: Sequence[str]
    plots: Sequence[str]
    written: Mapping[str, Written]
    mergekit_head: Sequence[str]
    met: Mapping[tuple[str, str], int]
    left_out: Sequence[str]
    included: Sequence[str]


def metadata(content: CardContent) -> Any:
    """huggingface_hub's ModelCardData. base_model: Hub repositories only, so none for models of the zoo alone."""
    from huggingface_hub import ModelCardData

    bases = hub_ids(content.parents)
    fields: dict[str, Any] = {
        **({"language": list(content.languages)} if content.languages else {}),
        **content.terms.license,
        "library_name": "transformers" if content.weights else "shoal",
        **({"pipeline_tag": "text-generation"} if content.weights else {}),
        "tags": [*TAGS, *([] if content.weights else [RECIPE_TAG])],
        **({"base_model": bases, "base_model_relation": "merge"} if bases else {}),
    }
    return ModelCardData(**fields)


def card(content: CardContent) -> str:
    """The text of README.md; it reads back as itself through ModelCard."""
    from huggingface_hub import ModelCard

    body = "\n\n".join(part for part in _parts(content) if part)
    return str(ModelCard(f"---\n{metadata(content).to_yaml()}\n---\n\n{body}\n"))


def _parts(content: CardContent) -> list[str]:
    first = (
        ""
        if content.weights
        else f"No weights here: `shoal download {content.repo} -o DIR` rebuilds them, byte by byte, from the parents."
    )
    return [
        first,
        f"# {content.repo.rpartition('/')[2]}",
        " ".join(f"{statement}." for statement in content.terms.statements),
        _verdict(content),
        _scores(content),
        _made(content),
        _search(content),
        _answers(content),
        _lineage(content),
        _reproduce(content),
        _licence(content),
        _private(content),
    ]


def _verdict(content: CardContent) -> str:
    result = content.result
    text = f"**Verdict: {result['verdict']}.** {result['claim'][:1].upper()}{result['claim'][1:]}."
    if result["winner"]["id"] in {b["name"] for b in result["baselines"] if b["kind"] == "parent"}:
        text += " So what is published here is that parent's weights under another name: prefer the parent."
    return text


def _scores(content: CardContent) -> str:
    result = content.result
    return "\n\n".join(
        [
            "## Scores",
            (
                f"On {result['test_items']} test items that the search did not see, in percent; differences in points, with"
                " 95% intervals of the paired difference."
            ),
            markdown_table(dict(result)),
            "\n".join(f"- {line}" for line in result_words(dict(result))[1:]),
        ]
    )


def _made(content: CardContent) -> str:
    recipe, lock = content.recipe, content.lock
    run = lock.run
    rows = []
    for index, model in enumerate(run.models):
        role = "base" if index == run.base else "merged" if index in run.sources else "not merged"
        source = _link(model.ref)
        if model.merge is not None:
            roots = ", ".join(root.name for root in model.merge.roots)
            source += f", a merge, rebuilt in float32 from its roots {roots}"
        rows.append(f"| {model.name} | {source} | {role} |")
    space = ", ".join([recipe.space.shape, *(recipe.space.tensor_types or ())])
    picture = "![The winner's parameters by layer](weights.png)" if "weights.png" in content.plots else ""
    return "\n\n".join(
        part
        for part in [
            "## What was merged, and how",
            "\n".join(["| name | model | part |", "| --- | --- | --- |", *rows]),
            (
                f"Method `{run.operator}`, written as {run.dtype}; parameters by layer ({space}, {len(run.genes)} genes)."
                f" The winner is candidate `{lock.winner.id}`; `weights_sha256` is `{lock.winner.weights_sha256}`"
                " (of the canonical merge, the same on every machine)."
            ),
            picture,
            "`mergekit_config.yml` is the same merge for plain mergekit. Its head says:",
            "\n".join(f"> {line}" for line in content.mergekit_head),
        ]
        if part
    )


def _link(ref: str) -> str:
    parts = []
    for one in (part.removeprefix("merge:") for part in ref.split("+")):
        repo, _, commit = one.partition("@")
        if one.startswith(("zoo:", "./")):
            parts.append(f"`{one}`")
        else:
            where = f"https://huggingface.co/{repo}" + (f"/tree/{commit}" if commit else "")
            parts.append(f"[{repo}]({where})" + (f" at `{commit[:12]}`" if commit else ""))
    return " + ".join(parts)


def _search(content: CardContent) -> str:
    lock, result = content.lock, content.result
    cost = result["cost"]
    rows = []
    for task in lock.run.tasks:
        for role in ROLES:
            items = task.roles[role]
            number = len(items.items)
            official = " (lm-eval's own test split)" if items.split == task.eval_split else ""
            rows.append(
                f"| {task.task} | {role} | {number} | {content.met.get((task.task, role), 0)} | {items.task} |"
                f" `{items.split}`{official} | {task.metric} |"
            )
    device = lock.device
    openings = len(lock.openings)
    opened = (
        f" The test items were opened {openings} times, ancestors' runs included." if openings > 1 else ""
    )
    picture = "![Progress of the search](convergence.png)" if "convergence.png" in content.plots else ""
    return "\n\n".join(
        part
        for part in [
            "## The search",
            (
                f"{cost['candidates']} candidates ({cost['failed']} failed), {cost['item_evaluations']} item evaluations,"
                f" {cost['seconds']['total']:.0f} s of merging and scoring on {device.words} ({device.dtype});"
                f" {lock.run.search.optimizer}, {lock.run.popsize} candidates per generation."
            ),
            (
                "Items by role: `search` items rank candidates, `select` items choose the winner, `test` items were opened"
                f" for the claim.{opened}"
            ),
            "\n".join(
                [
                    "| task | role | items | used | from task | split | metric |",
                    "| --- | --- | ---: | ---: | --- | --- | --- |",
                    *rows,
                ]
            ),
            picture,
        ]
        if part
    )


def _answers(content: CardContent) -> str:
    """Three fixed prompts, the best parent's answers and the winner's, as they were written during the run."""
    parents = [b for b in content.result["baselines"] if b["kind"] == "parent"]
    winner = content.result["winner"]["id"]
    best = max(parents, key=lambda b: b["score"])["name"] if parents else None
    if best is None or winner not in content.written or best not in content.written:
        return ""
    ours, theirs = content.written[winner].texts, content.written[best].texts
    if len(ours) != len(PROMPTS) or len(theirs) != len(PROMPTS):
        return ""
    shown = [n for n in SHOWN if not _NOT_OURS.search(ours[n] + theirs[n])][:3]
    parts = [
        "## What it writes",
        "Greedy answers to three fixed prompts, cut off at 128 tokens; they show a voice, and are no evaluation.",
    ]
    for number in shown:
        parts.append(f"Prompt:\n{_block(PROMPTS[number])}")
        parts.append(f"{best} (best parent):\n{_block(theirs[number])}")
        if winner != best:
            parts.append(f"{winner} (this merge):\n{_block(ours[number])}")
    return "\n\n".join(parts)


def _block(text: str) -> str:
    """A fenced block that the text cannot end."""
    if not text.strip():
        return "(nothing)"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _lineage(content: CardContent) -> str:
    ancestors = content.lock.lineage
    of_our_own = {a.reference for a in ancestors if a.relation == "parent"}
    lines = [
        f"- this merge (`{content.lock.name}`)",
        *(f"  {line}" for line in drawn(ancestors)),
        *(f"  - parent: `{p.pinned}`" for p in content.parents if not p.root and p.pinned not in of_our_own),
    ]
    return "\n\n".join(["## Lineage", "\n".join(lines)])


def _reproduce(content: CardContent) -> str:
    lines = [f'pip install "shoal=={content.lock.run.shoal}"', f"shoal reproduce {content.repo} --score"]
    text = [
        "## Reproduce",
        "```bash\n" + "\n".join(lines) + "\n```",
        "This rebuilds the weights from the parents, compares their hash, scores again and compares item by item.",
    ]
    custom = [t for t in content.lock.tasks if t.custom and t.source is None]
    told = [t.task for t in custom if t.scoring is not None]
    if told:
        text.append(
            f"Items of the publisher's own tasks {', '.join(told)} are in `{ITEMS}` and are scored from there."
        )
    unjudged = [t.task for t in custom if t.scoring is not None and t.scoring.rule is None]
    if unjudged:
        text.append(
            f"Of {', '.join(unjudged)} only log-likelihoods are compared, unless the task's own files are supplied by"
            " `--include-path`."
        )
    hidden = [t.task for t in custom if t.scoring is None]
    if hidden:
        text.append(
            f"The tasks {', '.join(hidden)} are the publisher's own and not published: to score again they must be supplied by"
            " `--include-path`; the lock's content hashes tell whether the items are the same."
        )
    if any(p.kind == "zoo" and not p.commit for p in content.parents):
        text.append(
            "Parents of the zoo are trained on your own machine: their bytes, and so the merge's, are the same only on"
            " the same kind of machine with the library versions that the lock names."
        )
    return "\n\n".join(text)


def _licence(content: CardContent) -> str:
    terms = content.terms
    name = terms.license.get("license_name", terms.license["license"])
    text = ["## Licence", f"By rule from every parent's: **{name}**."]
    if terms.quoted:
        text.append(f"Licence {terms.quoted}; shoal found none that it knows there.")
    text.append("\n".join(licence_rows(terms)))
    if terms.non_commercial:
        text.append("A parent's licence allows no commercial use.")
    if terms.remarks:
        text.append("\n".join(f"- {remark}" for remark in terms.remarks))
    if terms.license.get("license_link") == OWN_TEXT:
        text.append(f"What holds together is in [{OWN_TEXT}]({OWN_TEXT}).")
    text.append(ADVICE)
    return "\n\n".join(text)


def licence_rows(terms: Terms) -> list[str]:
    """Parents and their licences as a table of Markdown."""
    rows = ["| parent | licence | says |", "| --- | --- | --- |"]
    for parent in terms.parents:
        licence = parent.licence
        if licence is None:
            continue
        known = f"[{licence.name}]({parent.link or licence.link})"
        says = parent.where if parent.stated else f"the publisher ({parent.where} says nothing)"
        rows.append(f"| {parent.parent} | {known} | {says} |")
    return rows


def _private(content: CardContent) -> str:
    text = (
        "`journal/` holds every score as parquet: item ids, hashes, correctness, log-likelihoods; no prompts, targets"
        " or generations."
    )
    if ITEMS in content.included:
        text += f" `{ITEMS}` holds the requests of the publisher's own tasks, by the publisher's wish."
    left_out = "\n".join(f"- {note}" for note in content.left_out)
    return "\n\n".join(part for part in ["## What is in this repository", text, left_out] if part)
