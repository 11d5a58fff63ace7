"""Puts the sections of a report on one page that needs no network, and pictures beside it on request."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from tfnas.files import shown, write_text_atomically
from tfnas.latency.lut import LatencyTableError
from tfnas.report import sections
from tfnas.report.run_data import RunData, read_run
from tfnas.run import METRICS_FILE, TRAINING_FOLDER

REPORT_FILE = "report.html"
_SECTIONS = (
    ("Result", sections.summary),
    ("Network", sections.network),
    ("Latency over the search", sections.latency),
    ("Accuracy", sections.accuracy),
    ("Probabilities of operations (alpha)", sections.alphas),
    ("Probabilities of depths (beta)", sections.betas),
    ("Operations over the search", sections.operations),
    ("Widths over the search", sections.widths),
    ("Latency table", sections.curves),
    ("Configuration", sections.configuration),
    ("Versions", sections.versions),
)
_SIDE_BY_SIDE = (sections.latency, sections.accuracy, sections.operations, sections.widths)
_HALF = ' class="half"'
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --text: #1b1b1b; --back: #fff; --soft: #777; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #16181b; --soft: #999; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--back); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; }
@media (min-width: 60rem) { main { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; }
  section { grid-column: 1 / -1; min-width: 0; } section.half { grid-column: auto; } }
svg { max-width: 100%; height: auto; display: block; }
section > svg { max-width: 36rem; width: 100%; }
svg text { fill: var(--text); font-size: 12px; } svg text.small { font-size: 11px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .6rem 1.2rem;
  margin: 1rem 0; }
.facts dt { color: var(--soft); font-size: .85rem; } .facts dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; } .scroll svg { max-width: none; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
details td { white-space: normal; }
.bar { display: inline-block; width: 6rem; height: .7rem; margin-right: .4rem; background: var(--line); }
.bar span { display: block; height: 100%; background: #0072b2; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0; font-size: .85rem; }
.legend span { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem; }
.tiles.wide { grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.tiles svg { width: 100%; } figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); }
pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 30rem) { body { padding: .8rem; } .facts { grid-template-columns: 1fr 1fr; }
  table { font-size: .78rem; } th, td { padding: .2rem .25rem; } .bar { display: none; }
  section > svg text { font-size: 14px; } .tiles:not(.wide) svg text { font-size: 13px; } }
"""


def write_report(folder: str | os.PathLike[str], pictures: bool = False) -> Path:
    """Write `report.html` into a search's folder, atomically; returns its path.

    The page holds everything it shows: no script, no network. With `pictures` the charts over epochs are also drawn
    as PNG files beside it, which needs matplotlib (extra `plots`).

    Raises `ConfigError` where the folder is not that of a finished search, `ValueError` where a file is damaged,
    `ModuleNotFoundError` where pictures are asked for without matplotlib.
    """
    run = read_run(folder)
    try:
        text = page(run)
    except LatencyTableError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        files = " or ".join([METRICS_FILE, *([f"{TRAINING_FOLDER}/{METRICS_FILE}"] if run.training else [])])
        raise ValueError(
            f"{run.folder}/{files}: a record lacks what a report shows, or is of another search space "
            f"({type(error).__name__}: {error})"
        ) from error
    path = run.folder / REPORT_FILE
    write_text_atomically(path, text)
    if pictures:
        from tfnas.report.pictures import save_pictures

        save_pictures(run)
    return path


def page(run: RunData) -> str:
    """The page as HTML."""
    name = shown(run.folder.resolve().name)
    title = f"{run.space.name}, {run.facts.get('target_latency_ms', 0):.4g} ms: {name}"
    body = "".join(
        f"<section{_HALF if make in _SIDE_BY_SIDE else ''}><h2>{escape(name)}</h2>{make(run)}</section>"
        for name, make in _SECTIONS
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1><main>{body}</main></body></html>\n"
    )
