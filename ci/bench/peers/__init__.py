"""The comparison with other engines: their settings, what is measured of them, the rows that are kept, and the tables.

Rows are JSON lines (`records.py`); every comparison table in `docs/` is written from rows in `ci/bench/results`
(`pages.py`), and a test holds both equal.
"""
