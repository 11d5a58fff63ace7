"""The sections of a report, each a function from the run's data to HTML."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

import numpy as np

from tfnas.architecture import count_multiply_adds, count_parameters
from tfnas.progress import duration
from tfnas.report.run_data import RunData
from tfnas.report.svg import COLORS, Frame, Series, color, grid, legend, line_chart, share_bars, stacked_areas
from tfnas.space import Layer

# the most telling first: a phone shows about six
_COLUMNS = ("stage", "operation", "width", "ms", "latency share", "kernel", "expansion", "SE", "out", "stride")
_SHARES = "<p>Probabilities from 0 to 1, one above the other; epochs from left to right.</p>"
_SMALL = Frame(width=300, height=180, left=48, bottom=34)


def summary(run: RunData) -> str:
    """The result in figures."""
    facts, arch = run.facts, run.architecture
    target, by_table = facts.get("target_latency_ms"), run.table.architecture_ms(arch)
    rows = [
        ("target", f"{target:.4f} ms" if target is not None else "none"),
        (
            "latency by the table",
            f"{by_table:.4f} ms" + (f" ({100 * (by_table / target - 1):+.2f} %)" if target else ""),
        ),
        ("latency measured", _measured(run)),
        ("reachable by the table", "{:.4g} to {:.4g} ms".format(*run.start["reachable_range_ms"])),
        ("multiply-adds", f"{count_multiply_adds(arch) / 1e6:.2f} M"),
        ("parameters", f"{count_parameters(arch) / 1e6:.3f} M"),
        ("depths", " ".join(str(len(ops)) for ops in arch.stages)),
        ("repaired", "yes: the strongest network could not meet the target" if facts.get("repaired") else "no"),
        ("epochs", f"{len(run.epochs)} ({run.start['warmup_epochs']} warm-up), seed {run.start['seed']}"),
        ("engine", f"{run.start['engine']} on {run.start['device']}"),
    ]
    if run.end is not None:
        rows.append(("time", duration(run.end["seconds"])))
    trained = [record for record in run.training if record["kind"] == "end"]
    if trained and trained[-1]["test"] is not None:
        test = trained[-1]["test"]
        rows.insert(0, ("test accuracy after training", f"{100 * test['top1']:.2f} % of {test['images']} images"))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="facts">{items}</dl>'


def network(run: RunData) -> str:
    """The found network, layer by layer."""
    shares, table = run.shares_ms(), run.table
    total = table.base_ms + sum(shares)
    first = run.space.first_stage
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = [_row(["", "stem, head", "", f"{table.base_ms:.4f}", _share(table.base_ms / total), *[""] * 5])]
    for (layer, op), ms in zip(run.architecture.layers(), shares, strict=True):
        cells = [
            f"{layer.stage + first}.{layer.position + 1}",
            escape(op.candidate),
            f"{op.width} of {layer.max_width(layer.candidate_index(op.candidate))}",
            f"{ms:.4f}",
            _share(ms / total),
            f"{op.kernel_size}x{op.kernel_size}",
            f"{op.width / layer.in_channels:.2f}",
            str(op.se_channels or ""),
            str(layer.out_channels),
            str(layer.stride),
        ]
        rows.append(_row(cells))
    offset_ms, slope = table.correction
    note = ""
    if (offset_ms, slope) != (0.0, 1.0):
        note = (
            f"<p>The sum of {total:.4f} ms becomes {table.total_ms(total):.4f} ms by the table's correction for whole "
            f"networks ({offset_ms:+.4f} ms, times {slope:.4f}).</p>"
        )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'
    )


def latency(run: RunData) -> str:
    """Expected and derived latency over epochs, against the target."""
    epochs = _epoch_numbers(run)
    last, by_table = epochs[-1], run.table.architecture_ms(run.architecture)
    return line_chart(
        [
            Series("expected", epochs, [e["expected_latency_ms"] for e in run.epochs], COLORS[0]),
            Series("derived", epochs, [e["derived_latency_ms"] for e in run.epochs], COLORS[1]),
            Series("target", epochs, [e["target_latency_ms"] for e in run.epochs], COLORS[5], dashed=True),
            Series("found network", [last], [by_table], COLORS[2], dots=True),
        ],
        "epoch",
        "latency (ms)",
    )


def accuracy(run: RunData) -> str:
    """The supernet's accuracy, and the trained network's where there is one."""
    epochs = _epoch_numbers(run)
    held_out = [None if e["held_out_accuracy"] is None else 100 * e["held_out_accuracy"] for e in run.epochs]
    html = line_chart(
        [
            Series("training images", epochs, [100 * e["accuracy"] for e in run.epochs], COLORS[0]),
            Series("held-out images", epochs, held_out, COLORS[1], dots=True),
        ],
        "epoch of the search",
        "supernet accuracy (%)",
    )
    trained = [record for record in run.training if record["kind"] == "epoch"]
    if trained:
        numbers = [record["epoch"] + 1 for record in trained]
        validation = [None if r["validation"] is None else 100 * r["validation"]["top1"] for r in trained]
        html += "<h3>Training of the found network</h3>" + line_chart(
            [
                Series("training images", numbers, [100 * r["accuracy"] for r in trained], COLORS[0]),
                Series("validation images", numbers, validation, COLORS[1], dots=True),
            ],
            "epoch of the training",
            "accuracy (%)",
        )
    return html


def alphas(run: RunData) -> str:
    """Probability of every operation over epochs, a picture per layer."""
    x, alpha = _epoch_numbers(run), run.probabilities("log_alpha")
    pictures = [
        stacked_areas(x, [a[layer.index].tolist() for a in alpha], _name(run, layer)) for layer in run.space.layers
    ]
    return _candidates_legend(run) + _SHARES + f'<div class="tiles">{"".join(pictures)}</div>'


def betas(run: RunData) -> str:
    """Probability of every depth (sink), or of keeping each layer (skip-out), over epochs."""
    if run.space.depth_space == "skip-in":
        return "<p>In this space depth follows from the operation <code>skip</code> above.</p>"
    x, beta = _epoch_numbers(run), run.probabilities("log_beta")
    if run.space.depth_space == "skip-out":
        titles = [_name(run, layer) for layer in run.space.layers]
        entries = [("skip", color(0)), ("keep", color(1))]
    else:
        titles = [f"stage {s + run.space.first_stage}" for s in range(len(run.space.stages))]
        deepest = max(stage.depth for stage in run.space.stages)
        entries = [(f"{d + 1} layer{'s' if d else ''}", color(d)) for d in range(deepest)]
    pictures = [
        stacked_areas(x, [b[row].tolist() for b in beta], title)
        for row, title in enumerate(titles)
        if beta[0][row].sum() > 0
    ]
    return legend(entries) + _SHARES + f'<div class="tiles">{"".join(pictures)}</div>'


def operations(run: RunData) -> str:
    """The strongest operation of every layer over epochs, and how often each was it (paper, Fig. 2)."""
    strongest = run.strongest()
    layers = run.space.layers
    names = [_name(run, layer) for layer in layers]
    epochs = [str(number) for number in _epoch_numbers(run)]
    cells = [[color(choice[layer.index]) for choice in strongest] for layer in layers]
    titles = [[layer.candidates[choice[layer.index]].name for choice in strongest] for layer in layers]
    counted = [choice for e, choice in zip(run.epochs, strongest, strict=True) if not _is_warmup(run, e)] or strongest
    bars = []
    for layer, name in zip(layers, names, strict=True):
        counts = Counter(choice[layer.index] for choice in counted)
        bars.append((name, [counts[c] / len(counted) for c in range(len(layer.candidates))]))
    return (
        _candidates_legend(run)
        + "<h3>Strongest operation after each epoch</h3>"
        + grid(cells, names, epochs, "strongest operation by layer and epoch", titles)
        + f"<h3>Share of the {len(counted)} epochs past warm-up</h3>"
        + share_bars(bars, "share of epochs in which each operation was the strongest")
    )


def widths(run: RunData) -> str:
    """Width of every layer's strongest operation, as elasticity scaling left it, over epochs."""
    strongest = run.strongest()
    layers = run.space.layers
    cells, titles = [], []
    for layer in layers:
        row, words = [], []
        for e, choice in zip(run.epochs, strongest, strict=True):
            c = choice[layer.index]
            width, most = e["widths"][layer.index][c], layer.max_width(c)
            share = width / most if most else 0.0
            row.append(f"hsl(205 70% {90 - 60 * share:.0f}%)")
            words.append(f"{layer.candidates[c].name}: {width} of {most} channels")
        cells.append(row)
        titles.append(words)
    names = [_name(run, layer) for layer in layers]
    epochs = [str(number) for number in _epoch_numbers(run)]
    shades = [(f"{100 * s:.0f} % of the maximum width", f"hsl(205 70% {90 - 60 * s:.0f}%)") for s in (0.5, 0.75, 1.0)]
    html = legend(shades) + grid(cells, names, epochs, "width by layer and epoch", titles)
    gammas = [(e["epoch"] + 1, e["scaling"]["gammas"]) for e in run.epochs if e.get("scaling")]
    if gammas:
        steps = max(len(g) for _, g in gammas)
        first = run.space.first_stage
        series = [
            Series(
                f"stages {first + s} and later", [n for n, g in gammas if s < len(g)],
                [g[s] for _, g in gammas if s < len(g)], color(s),
            )
            for s in range(steps)
        ]  # fmt: skip
        html += "<h3>Factors of elasticity scaling (Algorithm 1)</h3>" + line_chart(series, "epoch", "gamma")
    return html


def curves(run: RunData) -> str:
    """The table's curves at every kept layer, with the point that was chosen."""
    pictures = []
    for layer, op in run.architecture.layers():
        series = []
        for c, candidate in enumerate(layer.candidates):
            if candidate.is_skip:
                continue
            key = layer.key(c)
            knots = run.table.curve(key).widths
            inside = knots[(knots >= layer.min_width(c)) & (knots <= layer.max_width(c))]
            x = sorted({layer.min_width(c), *inside.tolist(), layer.max_width(c)})
            series.append(Series(candidate.name, x, run.table.latencies_ms(key, np.array(x)).tolist(), color(c)))
        chosen = layer.candidate_index(op.candidate)
        at_ms = run.table.latency_ms(layer.key(chosen), op.width)
        series.append(Series("chosen", [op.width], [at_ms], color(chosen)))
        chart = line_chart(series, "width (channels)", "ms", _SMALL)
        pictures.append(
            f"<figure>{chart.partition('</ul>')[2]}<figcaption>{escape(_name(run, layer))}: {escape(op.candidate)}, "
            f"{op.width} channels</figcaption></figure>"
        )
    header = {k: v for k, v in run.table.header.items() if isinstance(v, str | int | float) and v not in ("", None)}
    return _candidates_legend(run) + f'<div class="tiles wide">{"".join(pictures)}</div>' + _mapping("Table", header)


def configuration(run: RunData) -> str:
    """The complete configuration."""
    return f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"


def versions(run: RunData) -> str:
    return _mapping("Software", run.start["versions"])


def _measured(run: RunData) -> str:
    measured = run.facts.get("measured_latency_ms")
    if measured is None:
        because = (run.end or {}).get("not_measured_because")
        return f"not measured{f': {because}' if because else ''}"
    return (
        f"{measured:.4f} ms ({100 * (measured / run.table.architecture_ms(run.architecture) - 1):+.2f} % to the table)"
    )


def _row(cells: list[str]) -> str:
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _share(share: float) -> str:
    return f'<span class="bar"><span style="width:{100 * share:.1f}%"></span></span>{100 * share:.1f} %'


def _mapping(title: str, values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in values.items())
    return f"<details><summary>{title}</summary><table>{rows}</table></details>"


def _candidates_legend(run: RunData) -> str:
    named = {c: candidate.name for layer in run.space.layers for c, candidate in enumerate(layer.candidates)}
    return legend([(name, color(c)) for c, name in sorted(named.items())])


def _name(run: RunData, layer: Layer) -> str:
    return f"layer {layer.index + 1} ({layer.stage + run.space.first_stage}.{layer.position + 1})"


def _epoch_numbers(run: RunData) -> list[float]:
    return [e["epoch"] + 1 for e in run.epochs]


def _is_warmup(run: RunData, epoch: dict[str, Any]) -> bool:
    return bool(epoch["epoch"] < run.start["warmup_epochs"])
