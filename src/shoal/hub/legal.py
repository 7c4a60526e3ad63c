"""The texts that licences want to travel with a merge."""

from __future__ import annotations

from pathlib import Path

from shoal.hub.card import licence_rows
from shoal.hub.licences import ADVICE, OWN_TEXT, Terms


def write_legal(folder: Path, found: Terms) -> None:
    """NOTICE, licence files of the parents as they have them, and LICENSE.md where no single licence holds."""
    notices = list(found.notices)
    for parent in found.parents:
        for name, text in parent.files:
            target = folder / "licences" / parent.parent.replace("/", "--") / f"{Path(name).stem}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
            if name.upper().startswith("NOTICE"):
                notices.append(f"{parent.parent}:\n{text.strip()}")
    if notices:
        (folder / "NOTICE").write_text("\n\n".join(notices) + "\n", encoding="utf-8")
    if found.license.get("license_link") == OWN_TEXT:
        lines = ["# Licences", "All of these hold together:", "\n".join(licence_rows(found))]
        lines += [f"Licence {found.quoted}."] if found.quoted else []
        (folder / OWN_TEXT).write_text("\n\n".join([*lines, ADVICE]) + "\n", encoding="utf-8")
