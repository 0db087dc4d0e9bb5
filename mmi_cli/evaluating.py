"""What `mmi eval` does with its options: score one run, compare several, or run a suite; cards on stdout.

Place in the flow: `commands/eval.py` hands its options over; meaning is in `mmi_engine.metrics` and
`mmi_engine.toon.measure`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_cli import console
from mmi_engine.errors import UsageError

if TYPE_CHECKING:
    from mmi_engine.metrics.base import Measure, Options
    from mmi_engine.metrics.bootstrap import Difference
    from mmi_engine.metrics.compare import Comparison
    from mmi_engine.metrics.pairs import References, Results
    from mmi_engine.metrics.score import Card

SHOWN = 10  # ids of problem items on stderr; metrics.json has more


def run(options: dict[str, Any]) -> int:
    """Dispatch by what was named; returns the exit code."""
    paths = list(options["paths"])
    if options["suite"] is not None:
        if paths:
            raise UsageError("--suite takes no RESULTS", remedy="name the suite's data with --data DIR")
        from mmi_cli import suites

        return suites.run(options)
    if options["references"] is not None:
        if not paths:
            raise UsageError("no run to score", remedy="mmi eval RUN… --references R")
        return _score(options, paths, options["references"])
    if len(paths) > 1 and any(Path(paths[-1]).glob("results*.jsonl")):
        raise UsageError(f"{len(paths)} runs and no truth", remedy=f"mmi eval {' '.join(paths)} --references R")
    if len(paths) != 2:
        remedy = "mmi eval RESULTS REFERENCES, or mmi eval A B … --references R, or mmi eval --suite NAME"
        raise UsageError(f"expected RESULTS and REFERENCES, found {len(paths)} arguments", remedy=remedy)
    return _score(options, paths[:1], paths[1])


def _score(options: dict[str, Any], paths: list[str], reference: str) -> int:
    from mmi_engine.metrics import pairs, registry

    references = pairs.read_references(reference, root=options["root"], allow_urls=options["allow_urls"])
    runs = [pairs.read_results(path) for path in paths]
    names = [name for entry in options["metrics"] for name in entry.split(",") if name]
    if not names:
        names = _chosen(references, runs[0], registry.choose)
    if len(runs) == 1:
        return _one(options, names, references, runs[0])
    return _several(options, names, references, runs)


def _chosen(references: References, run: Results, choose: Any) -> list[str]:
    """Metrics that fit the first item with a result."""
    for row in references.rows:
        if row.id in run.rows:
            names: list[str] = choose(row.data, run.rows[row.id][1])
            console.current().notice(f"metrics that fit these rows: {', '.join(names)}")
            return names
    from mmi_engine.metrics.pairs import pair

    pair(references, run)  # says what is wrong
    raise UsageError("no item has a result", remedy="name a metric with --metric")


def metric_options(options: dict[str, Any], progress: Any = None) -> Options:
    """Resources of the metrics from the command line."""
    from mmi_engine.metrics.base import Options

    cache = None if options["no_cache"] else Path(options["cache"] or _cache_home())
    paths = {name: Path(options[name]) if options[name] else None for name in ("inception", "clip")}
    return Options(
        variant=options["parity"] or "default",
        segmenter=options["segmenter"],
        model=options["model"],
        device=_device(options["device"]),
        batch_size=options["batch_size"] or 32,
        cache=cache,
        progress=(lambda what, done, total: progress(done, total)) if progress else lambda what, done, total: None,
        **paths,
    )


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmi" / "features"


def _one(options: dict[str, Any], names: list[str], references: References, run: Results) -> int:
    from mmi_engine.metrics import score, worst

    how = {"policy": options["missing"], "resamples": options["resamples"]}
    with console.current().counting("scoring") as progress:
        cards = score.evaluate(names, references, run, metric_options(options, progress), **how)
    out = options["out"] or run.folder
    about = {"references": {"name": references.name, "sha256": references.fingerprint}, "run": run_of(run)}
    path = score.write(cards, out, about)
    for card in cards:
        show(card)
    if options["worst"]:
        worst.write(cards, out / "worst.html", options["worst"])
    console.current().event("written", f"→ {path}", path=str(path))
    return exit_code(cards)


def run_of(run: Results) -> dict[str, Any]:
    """What run.json says of the model and settings behind the results."""
    identity = run.run.get("identity")
    identity = identity if isinstance(identity, dict) else {}
    return {"results": Path(run.name).name, **{key: identity[key] for key in ("model", "settings") if key in identity}}


def exit_code(cards: list[Card]) -> int:
    """3 where items had no usable result and that was not accepted with ``--missing skip``."""
    return 3 if any(card.problems and card.policy == "wrong" for card in cards) else 0


def show(card: Card) -> None:
    """A card: its line on stdout, the measures under it, remarks and problem items on stderr."""
    from mmi_engine.versions import versions

    terminal = console.current()
    rule = "counted as wrong" if card.policy == "wrong" else "left out"
    lost = f"missing {len(card.missing)}, failed {len(card.failed)}, unusable {len(card.unusable)} ({rule})"
    known = versions()
    terminal.out(
        f"{card.metric} · {card.variant} · {card.items} items · {lost} · {card.references:g} references each · "
        f"{card.implementation} · mmi {known['mmi']}, Python {known['python']}, numpy {known.get('numpy', '?')}"
    )
    terminal.table([("  " + m.name, number(m), interval(m), baselines(m)) for m in card.measures])
    if card.variant == "released":
        terminal.notice(f"{card.metric}, released variant: {card.differs or 'no different from the default'}")
    remarks(card)


def remarks(card: Card) -> None:
    """Notes and problem items on stderr."""
    terminal = console.current()
    for note in card.notes:
        terminal.warning(f"{card.metric}: {note}")
    for kind in ("missing", "failed", "unusable"):
        found: dict[str, str] = getattr(card, kind)
        if found:
            listed = "; ".join(key if why == kind else f"{key} ({why})" for key, why in list(found.items())[:SHOWN])
            more = f" and {len(found) - SHOWN} more, see metrics.json" if len(found) > SHOWN else ""
            terminal.warning(f"{card.metric}: {len(found)} {kind}: {listed}{more}")
    if card.extra:
        terminal.warning(
            f"{card.metric}: {len(card.extra)} results that no reference asks for, such as {card.extra[0]}"
        )


def number(measure: Measure) -> str:
    """The value with its unit."""
    unit = f" {measure.unit}" if measure.unit else ""
    return f"{measure.value:.{digits(measure)}f}{unit}"


def digits(measure: Measure) -> int:
    """Decimals worth showing: two of shares and of large numbers, else four."""
    return 2 if measure.unit or abs(measure.value) >= 10 else 4


def interval(measure: Measure) -> str:
    """The 95 % interval, or a dash."""
    if measure.low != measure.low:  # NaN
        return "–"
    places = digits(measure)
    extreme = measure.unit == "%" and measure.value in (0.0, 100.0)
    how = "Wilson" if extreme or measure.draws is None else f"{len(measure.draws)} resamples"
    return f"[{measure.low:.{places}f} … {measure.high:.{places}f}]  {how}"


def baselines(measure: Measure) -> str:
    """What would be reached without looking."""
    return " · ".join(f"{name} {value:.{digits(measure)}f}" for name, value in measure.baselines.items())


def _several(options: dict[str, Any], names: list[str], references: References, runs: list[Results]) -> int:
    from mmi_engine.metrics import plot, worst
    from mmi_engine.metrics.compare import compare

    how = {"policy": options["missing"], "resamples": options["resamples"]}
    with console.current().counting("scoring") as progress:
        found = compare(names, references, runs, metric_options(options, progress), **how)
    for comparison in found:
        _show_comparison(comparison)
    out: Path | None = options["out"]
    if out is None:
        console.current().notice("--out DIR keeps the table, a plot per metric and galleries of the worst items")
    else:
        _write_comparison(found, references, out)
        for comparison in found:
            plot.plot(comparison.cards, out / f"{comparison.metric}.png")
        for k, run_ in enumerate(runs):
            if options["worst"]:
                stem = f"worst-{k + 1}-{plot.label(run_.name)}"
                worst.write([comparison.cards[k] for comparison in found], out / f"{stem}.html", options["worst"])
        console.current().event("written", f"→ {out}", path=str(out))
    return max(exit_code(comparison.cards) for comparison in found)


def _write_comparison(found: list[Comparison], references: References, out: Path) -> None:
    from mmi_engine.metrics.score import write_json
    from mmi_engine.versions import versions

    content = {
        "comparisons": [comparison.to_json() for comparison in found],
        "references": {"name": references.name, "sha256": references.fingerprint},
        "versions": versions(),
    }
    write_json(out / "metrics.json", content)


def _gap(change: Difference) -> tuple[str, str, str]:
    """Difference, its interval and p; dashes where nothing was resampled."""
    if change.low != change.low:  # NaN
        return f"{change.value:+.4g}", "–", "–"
    span = f"[{change.low:+.4g} … {change.high:+.4g}]"
    return f"{change.value:+.4g}", span, f"{change.p:.3g} ({change.test})"


def _show_comparison(comparison: Comparison) -> None:
    terminal = console.current()
    base = comparison.cards[0]
    terminal.out(f"{comparison.metric} · {base.variant} · {base.items} items · paired differences from {base.run}")
    header = ("run", "measure", "score", "interval", "difference", "of which 95 %", "p", "without result")
    rows = []
    for k, card in enumerate(comparison.cards):
        for measure in card.measures:
            change = comparison.differences[k - 1][measure.name] if k else None
            gap = ("", "", "") if change is None else _gap(change)
            rows.append((card.run, measure.name, number(measure), interval(measure), *gap, str(card.problems)))
    terminal.table(rows, header=header)
    for card in comparison.cards:
        remarks(card)
