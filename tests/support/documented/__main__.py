"""Check what the pages promise, then build them as a site: ``make docs``.

python -m tests.support.documented [--out build/site]

A fault is a line on stderr, and exit status 1.  Needs no network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import sla_megatron

from ..launch import ROOT
from .links import dead_links
from .names import wrong_names


def main() -> None:
    """Links, names, flags, then the site."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", metavar="FOLDER")
    out = parser.parse_args().out.absolute()
    print("docs: links, pictures and public names", flush=True)
    faults = [*dead_links(ROOT), *wrong_names(ROOT, sla_megatron._HOME)]
    print("docs: the flags of every command, which are asked of the commands", flush=True)
    # Imports Megatron, which takes seconds.
    from .flags import unknown_words

    faults += unknown_words(ROOT)
    print("docs: the site", flush=True)
    from .site import build_site, misread_pages

    # What is not built cannot be compared.
    faults += build_site(ROOT, out) or misread_pages(ROOT, out)
    if faults:
        sys.exit("\n".join([*faults, f"docs: {len(faults)} faults"]))
    port = "python -m http.server --directory"
    print(f"docs: {out / 'index.html'}, to be opened as it is, or with a server: {port} {out}")


if __name__ == "__main__":
    main()
