"""`hotplug explain`: groups with reasons, candidates of a site, differences, and the JSON document's schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_platforms import FakePlatform, candidates, limits
from typer.testing import CliRunner
from whole_calls import reference_kernel

from hotplug.cli import display
from hotplug.cli.main import app
from hotplug.cli.plan_view import short
from hotplug.core.ops.registry import SiteSpec, Verdict
from hotplug.core.startup import bind as bind_module

DOCS = Path(__file__).parent.parent / "docs" / "explain.md"


def only_layer_0(spec: SiteSpec) -> Verdict:
    return Verdict(spec.site == "layers.0.attn", "window of other layers not supported")


def two_platforms(*_: Any) -> Any:
    flash = reference_kernel("attention", "acme.flash", check=only_layer_0, rank=5)
    decode = reference_kernel("attention", "acme.decode", accepts=lambda b: b.max_query_len == 1, rank=7)
    return candidates(
        FakePlatform(name="acme", kernels=[flash, decode]),
        FakePlatform(name="plain", devices=(), facts=limits(block_sizes=(32,))),
        FakePlatform(name="other", facts=limits(block_sizes=(32,)), kernels=[reference_kernel("rms_norm", "other")]),
    )


@pytest.fixture
def explain(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bind_module, "discover", two_platforms)
    monkeypatch.setattr(display, "selected", lambda *_: None)

    def run(*args: str, device: str = "acme", code: int = 0) -> str:
        chosen = ("--device", device) if device else ()
        result = CliRunner().invoke(app, ["explain", str(tiny_model), "--load-format", "dummy", *chosen, *args])
        assert result.exit_code == code, result.output
        return result.output

    return run


def test_sites_of_one_choice_are_one_line_with_the_reason(explain):
    out = re.sub(" +", " ", explain())
    assert "1x attention -> acme.decode+acme.flash: rank 7 layers.0.attn" in out
    assert "1x -> acme.decode+reference: rank 7, other shapes to the reference layers.1.attn" in out


def test_a_reference_says_which_kernel_refused_and_why(explain):
    assert "-> acme.decode+reference" in explain("--force", "layers.0.attn=acme.flash")


@pytest.mark.parametrize(
    ("sites", "text"),
    [
        (["layers.0.attn", "layers.1.attn", "layers.3.attn"], "layers.[0-1,3].attn"),
        (["layers.4.attn"], "layers.4.attn"),
        (["a", "b", "c", "d"], "a, b, c and 1 more"),
        (["layers.0.x", "norm"], "layers.0.x, norm"),
    ],
)
def test_site_names_are_shortened(sites, text):
    assert short(sites) == text


# --- --why ----------------------------------------------------------------------------------------


def test_why_lists_every_candidate_with_its_verdict(explain):
    (site,) = json.loads(explain("--why", "layers.1.attn", "--json"))["sites"]
    table = {c["provider"]: (c["outcome"], c["ok"], c["shapes"], c["reason"]) for c in site["candidates"]}
    assert table["acme.flash"] == ("refused", False, "all", "window of other layers not supported")
    assert table["acme.decode"][:3] == ("bound", True, "some")
    assert table["reference"] == ("bound", True, "all", "step shapes that no kernel accepts")


def test_why_takes_a_pattern_and_shows_sites_that_are_alike_once(explain):
    out = explain("--why", "layers.*.mlp.down")
    assert "layers.[0-1].mlp.down (2 sites alike): linear -> reference" in out


def test_why_of_a_forced_site_says_so(explain):
    out = explain("--why", "layers.0.attn", "--force", "layers.0.attn=acme.flash")
    assert "acme.flash is forced" in out


def test_why_of_an_unknown_site_names_the_nearest(explain):
    assert "no call site matches 'layers.0.atn'" in explain("--why", "layers.0.atn", code=2)


# --- --diff ---------------------------------------------------------------------------------------


def test_diff_of_two_platforms_groups_what_changed(explain):
    out = explain("--diff", "acme", "other", device="")
    assert "platform: acme -> other" in out
    assert "-> other (rank 1)" in out
    assert "block_size 16 -> 32" in out


def test_diff_reads_saved_reports(explain, tmp_path):
    saved = tmp_path / "before.json"
    saved.write_text(explain("--json"))
    document = json.loads(explain("--diff", str(saved), "acme", "--json", device=""))
    assert document["sites"] == document["only_a"] == document["only_b"] == []
    changed = json.loads(saved.read_text())
    changed["sites"][0]["provider"] = "old.kernel"
    saved.write_text(json.dumps(changed))
    (site,) = json.loads(explain("--diff", str(saved), "acme", "--json", device=""))["sites"]
    assert (site["site"], site["differs"], site["a"]["provider"]) == ("embed", ["provider"], "old.kernel")


@pytest.mark.parametrize(
    ("text", "fault"),
    [("{", "not valid JSON"), ("{}", "not a report"), ('{"schema": 9, "plan_hash": "", "sites": []}', "schema 9")],
)
def test_diff_of_a_file_that_is_no_report_is_refused(explain, tmp_path, text, fault):
    (tmp_path / "x.json").write_text(text)
    assert fault in explain("--diff", str(tmp_path / "x.json"), "acme", device="", code=2)


# --- the document ---------------------------------------------------------------------------------

TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}


def fields(path: str, value: Any) -> dict[str, Any]:
    """Every field of a document by its path, list items under []."""
    found = {}
    for name, item in value.items():
        at = f"{path}.{name}".lstrip(".")
        found[at] = item
        if isinstance(item, dict) and name != "facts":
            found |= fields(at, item)
        if isinstance(item, list) and item and isinstance(item[0], dict):
            found |= {k: v for entry in item for k, v in fields(f"{at}[]", entry).items()}
    return found


def test_the_json_report_is_what_its_page_says(explain):
    report = json.loads(explain("--json"))
    rows = [line.split("|") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    documented = {row[1].strip().strip("`"): row[2].strip() for row in rows}
    found = fields("", report)
    assert set(found) == set(documented)
    for name, value in found.items():
        assert isinstance(value, TYPES[documented[name]]), name
    assert report["schema"] == 1
    assert report["torch"] == str(torch.__version__)
