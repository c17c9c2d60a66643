"""The page on variants: its figures and its pictures are what ``sla-plan`` makes of its flags."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sla_megatron.commands.plan import cli
from sla_megatron.common.presets import preset_flags
from tests.support.launch import ROOT

# Of Megatron's own making.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:'type' is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("sources_parsed_once"),
]

PAGE = (ROOT / "docs" / "variants.md").read_text()
PP4 = "--pipeline-model-parallel-size 4"
PP2_VPP2 = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"

#: Beginning of a setting's name in the page -> its picture.
PICTURES = {
    "SLA": "sla",
    "SLA, the other reading": "sla-near",
    "values alone": "values",
    "keys alone": "keys",
    "SkipV1Former": "skipv1",
    "CLA of two": "cla2",
    "half-shared": "half-shared",
}

SlaPlan = Callable[..., dict[str, Any]]


def rows(second_column: str) -> dict[str, dict[str, str]]:
    """The page's table with that column: setting -> column -> cell."""
    (block,) = re.findall(rf"^\| setting \| {re.escape(second_column)} \|.*\n(?:\|.*\n)+", PAGE, flags=re.MULTILINE)
    header, _, *lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
    return {line[0].split(":")[0]: dict(zip(header, line, strict=True)) for line in lines}


SETTINGS = rows("flags beside `--sla`")


@pytest.fixture
def sla_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> SlaPlan:
    """The command's JSON for the page's model."""

    def run(presets: str, *flags: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["sla-plan", *preset_flags(presets), *flags, "--json", "-"])
        cli.main()
        return json.loads(capsys.readouterr().out)

    return run


def test_every_setting_is_shown() -> None:
    assert list(SETTINGS) == list(rows("parameters, full")) == list(PICTURES)
    drawn = re.findall(r"^### (.*)\n\n!\[.*\]\(variants/(.*)\.svg\)$", PAGE, flags=re.MULTILINE)
    assert [(name.lower(), picture) for name, picture in drawn] == [
        (name.lower(), picture) for name, picture in PICTURES.items()
    ]
    assert {path.stem for path in (ROOT / "docs" / "variants").iterdir()} == set(PICTURES.values())


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting(sla_plan: SlaPlan, setting: str, tmp_path: Path) -> None:
    """Its ratios to dense, its picture, and its preset, which says the same."""
    flags, picture = SETTINGS[setting]["flags beside `--sla`"].strip("`").split(), f"{PICTURES[setting]}.svg"
    one, two = (sla_plan("gpt2-124m 1k", "--sla", *flags, *layout.split()) for layout in (PP4, PP2_VPP2))
    ratios = {
        "parameters, full": (one, "full", "parameters"),
        "parameters, pruned": (one, "pruned", "parameters"),
        "operations a token, pruned": (one, "pruned", "operations"),
        "K/V cache": (one, "full", "cache_bytes"),
        "wire, PP 4": (one, "full", "wire_bytes"),
        "wire, PP 2 VPP 2": (two, "full", "wire_bytes"),
    }
    found = {
        column: f"{plan['costs'][model][figure] / plan['costs']['dense'][figure]:.3f}"
        for column, (plan, model, figure) in ratios.items()
    }
    assert rows("parameters, full")[setting] == {"setting": setting} | found
    assert one["costs"]["full"]["operations"] == one["costs"]["dense"]["operations"]

    preset = SETTINGS[setting]["preset"].strip("`")
    drawn = tmp_path / picture
    again = sla_plan(
        f"gpt2-124m 1k {preset}", *([] if preset else ["--sla", *flags]), *PP4.split(), "--draw", str(drawn)
    )
    assert again == one
    assert drawn.read_bytes() == (ROOT / "docs" / "variants" / picture).read_bytes(), (
        f"{picture} is not what sla-plan draws: sla-plan ... {PP4} --draw docs/variants/{picture} --overwrite"
    )
