"""What the Hub's /api/validate-yaml says of a card's front matter, as far as its documentation tells.

Source: huggingface.co/docs/hub, "Model Cards" and "Licenses" (keys, license ids, base_model_relation).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# fmt: off
LICENSES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0",
    "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0",
    "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl",
    "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0",
    "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license",
    "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4",
    "grok2-community", "gemma", "unknown", "other",
}
# fmt: on
RELATIONS = {"finetune", "adapter", "quantized", "merge"}
ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


def check(content: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a README.md with front matter."""
    if not content.startswith("---\n"):
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(content[4:].partition("\n---")[0])
    except yaml.YAMLError as error:
        return [f"YAML does not parse: {str(error).splitlines()[0]}"], []
    if not isinstance(card, dict):
        return ["metadata must be a mapping"], []
    return [text for text in (rule(card) for rule in _RULES) if text], []


def _license(card: dict[str, Any]) -> str | None:
    found = card.get("license")
    some = found if isinstance(found, list) else [] if found is None else [found]
    wrong = [one for one in some if one not in LICENSES]
    return f'"license" must be one of [{", ".join(sorted(LICENSES))}]' if wrong else None


def _license_name(card: dict[str, Any]) -> str | None:
    name = card.get("license_name")
    if name is not None and not re.fullmatch(r"[a-z0-9.-]+", str(name)):
        return '"license_name" must be lowercase letters, digits, "-" and "."'
    return None


def _base_model(card: dict[str, Any]) -> str | None:
    found = card.get("base_model")
    some = [found] if isinstance(found, str) else found
    if some is None or (isinstance(some, list) and all(isinstance(x, str) and ID.fullmatch(x) for x in some)):
        return None
    return '"base_model" with value is not valid. Use a model id from https://hf.co/models.'


def _relation(card: dict[str, Any]) -> str | None:
    found = card.get("base_model_relation")
    return (
        None
        if found is None or found in RELATIONS
        else f'"base_model_relation" must be one of {sorted(RELATIONS)}'
    )


def _language(card: dict[str, Any]) -> str | None:
    found = card.get("language")
    some = [found] if isinstance(found, str) else found
    if some is None or (isinstance(some, list) and all(isinstance(x, str) and x.islower() for x in some)):
        return None
    return '"language" must be ISO 639-1, 639-2 or 639-3 codes'


def _tags(card: dict[str, Any]) -> str | None:
    found = card.get("tags")
    return (
        None
        if found is None or (isinstance(found, list) and all(isinstance(x, str) for x in found))
        else '"tags" must be an array of strings'
    )


def _model_index(card: dict[str, Any]) -> str | None:
    found = card.get("model-index")
    if found is None:
        return None
    if not isinstance(found, list) or not all(
        isinstance(x, dict) and "name" in x and "results" in x for x in found
    ):
        return '"model-index" must be an array of name and results'
    for result in [result for x in found for result in x["results"]]:
        if not {"task", "dataset", "metrics"} <= set(result) or not {"type", "name"} <= set(
            result["dataset"]
        ):
            return '"model-index[0].results[0]" needs task, dataset (type, name) and metrics'
    return None


_RULES = (_license, _license_name, _base_model, _relation, _language, _tags, _model_index)
