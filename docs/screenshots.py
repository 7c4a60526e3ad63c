"""Take the pictures of a report that the documentation shows: `python docs/screenshots.py RUN`.

Writes the report of a finished run anew, looks at it in headless Chromium (on PATH) and saves docs/report/desktop.png,
dark.png and phone.png: the beginning of the page, as a reader meets it. Exit code 1 where the page complains.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

PICTURES = Path(__file__).parent / "report"
VIEWS = {"desktop": (1280, 2560), "dark": (1280, 2560), "phone": (375, 2300)}  # pixels of the page


def main(run: Path) -> int:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from chromium import Chromium, find_chromium

    from shoal.page import write_page

    program = find_chromium()
    if program is None:
        print("no Chromium on PATH (Debian: apt-get install chromium)", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as place, Chromium(program, Path(place) / "profile") as browser:
        page = write_page(run, Path(place) / "report.html")
        for name, (width, height) in VIEWS.items():
            # no taller window: the page is laid out as on a screen, and cut
            browser.open(page, width, dark=name == "dark", phone=name == "phone")
            browser.wait("html.drawn")
            if browser.problems:
                print(f"{name}: {browser.problems}", file=sys.stderr)
                return 1
            browser.picture(PICTURES / f"{name}.png", size=(width, height))
            print(PICTURES / f"{name}.png")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
