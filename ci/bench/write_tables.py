"""Write the comparison tables of `docs/` anew from the rows in `ci/bench/results`: `python ci/bench/write_tables.py`.

`--check` writes nothing and fails where a page differs. `--keep FILE` first takes measured rows over as those of the
results file with this name (`cpu.jsonl`, say).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peers import pages
from peers.records import RESULTS, merge, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="rows to take over")
    parser.add_argument("--name", help="of the results file that takes them; default: FILE's")
    options = parser.parse_args()
    if options.keep is not None:
        merge(RESULTS / (options.name or options.keep.name), read(options.keep))
    stale = pages.stale()
    for page in stale:
        print(f"{page.relative_to(pages.ROOT)}: {'differs from its rows' if options.check else 'written anew'}")
        if not options.check:
            page.write_text(pages.written(page.read_text()))
    if stale and options.check:
        raise SystemExit("run `make bench-tables`")


if __name__ == "__main__":
    main()
