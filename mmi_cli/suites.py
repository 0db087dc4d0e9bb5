"""`mmi eval --suite`: generate, score, and print one table beside the paper's figures.

Place in the flow: `evaluating.py` comes here with ``--suite``. The suite file says what to do
(`mmi_engine.metrics.suite`), `produce.py` generates, `score.py` scores; an interrupted suite goes on where it was.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_cli import console, evaluating
from mmi_engine.errors import ManifestError, OutputMismatchError, UsageError

if TYPE_CHECKING:
    from mmi_engine.metrics.base import Measure, Options
    from mmi_engine.metrics.pairs import References, Results
    from mmi_engine.metrics.score import Card
    from mmi_engine.metrics.suite import Goal, Part, Suite

NEEDS = {"clip-i": "clip", "clip-t": "clip", "fid": "inception", "fid64": "inception", "kid": "inception"}


def run(options: dict[str, Any]) -> int:
    """All parts of one suite, or of all of the paper's; the exit code is 3 where items failed."""
    from mmi_engine.metrics import suite

    terminal = console.current()
    if options["suite"] == "ls":
        listed = [(found.name, found.title, _data(found)) for found in map(suite.load, suite.names())]
        terminal.table(listed, header=("suite", "title", "manifests"))
        return 0
    if options["out"] is None:
        raise UsageError("--suite needs --out", remedy="name the folder of its results: --out DIR")
    chosen = [n for n in suite.names() if n != "toon"] if options["suite"] == "paper" else [options["suite"]]
    suites = [suite.load(name) for name in chosen]
    if any(found.makes is None for found in suites) and options["data"] is None:
        raise UsageError(
            f"--suite {options['suite']} needs your data: {_data(suites[0])}",
            remedy=f"name its folder with --data DATA; get it by {suites[0].format}",
        )
    parts = [(found, part) for found in suites for part in _parts(found, options)]
    if not any(found.makes or _manifest(found, part, options)[0].is_file() for found, part in parts):
        names = _data(suites[0]) + (", …" if len(suites) > 1 else "")
        raise UsageError(
            f'"{options["data"]}" holds no manifest of --suite {options["suite"]}: {names}',
            remedy="name the folder they are in with --data DATA; mmi eval --suite ls lists them",
        )
    shared: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    code = 0
    for found, part in parts:
        try:
            cards, remarks = _part(found, part, options, shared)
        except ManifestError as error:  # the other parts' numbers must not be lost for it
            cards, remarks, code = [None] * len(part.goals), [f"not scored: {error}"], 3
        code = max(code, evaluating.exit_code([card for card in cards if card is not None]))
        code = max(code, 3 if any(remark.startswith("--metric") for remark in remarks) else 0)
        rows += _rows(found, part, cards, remarks)
    _print(rows, options["out"], suites, f"model {Path(options['model']).name}")
    return code


def _data(found: Suite) -> str:
    return ", ".join(f"{part.data}.jsonl" for part in found.parts)


def _parts(found: Suite, options: dict[str, Any]) -> list[Part]:
    wanted = options["tasks"].split(",") if options["tasks"] else None
    known = {part.task for part in found.parts}
    if wanted and set(wanted) - known:
        raise UsageError(
            f"--tasks {options['tasks']}: no such task in {found.name}", remedy=f"{', '.join(sorted(known))}"
        )
    return [part for part in found.parts if wanted is None or part.task in wanted]


def _part(
    found: Suite, part: Part, options: dict[str, Any], shared: dict[str, Any]
) -> tuple[list[Card | None], list[str]]:
    """Generate and score one part: a card per goal (None for what was not there), and remarks."""
    from mmi_engine.metrics import produce

    out = Path(options["out"]) / part.data
    manifest, limit = _manifest(found, part, options)
    if not manifest.is_file():
        return [None] * len(part.goals), [f"no data: {manifest.name}"]
    clip = Path(options["clip"]) if options["clip"] else None
    task, remarks = produce.task_of(part, options["model"], tuned=options["tuned"], clip=clip)
    terminal = console.current()
    reporter = console.RunReporter(terminal, f"{found.name} {part.data}")
    choices = {key: options[key] for key in ("model", "device", "threads", "batch_size") if options[key] is not None}
    choices["settings"] = {"steps": options["steps"]} if options["steps"] else {}
    try:
        produce.produce(
            part, task, manifest, out, choices, limit=limit, shared=shared, reporter=reporter
        )  # fmt: skip
    except OutputMismatchError as error:  # its own remedy is an option of the generating commands
        raise OutputMismatchError(error.message, remedy=f'choose another --out, or remove "{out}"') from error
    finally:
        reporter.end()
    cards, more = _score(part, manifest, limit, out, options)
    return cards, remarks + more


def _manifest(found: Suite, part: Part, options: dict[str, Any]) -> tuple[Path, int | None]:
    """The part's rows, drawn first where the suite makes its own; and how many of them."""
    if found.makes is None:
        folder = Path(options["data"])
        imported = folder / part.data / "manifest.jsonl"  # as `mmi data import … --out DATA/NAME` leaves it
        return imported if imported.is_file() else folder / f"{part.data}.jsonl", options["limit"]
    from mmi_engine.toon import measure

    count = options["stories"] if part.task == "story" else options["scenes"]
    folder = Path(options["out"]) / "data"
    return measure.draw(folder, part.task, count, options["start"]), count


def _score(
    part: Part, manifest: Path, limit: int | None, out: Path, options: dict[str, Any]
) -> tuple[list[Card | None], list[str]]:
    from mmi_engine.metrics import pairs, score, worst

    references = pairs.read_references(manifest)
    if limit is not None:
        references = references.only(row.id for row in references.rows[:limit])
    results = pairs.read_results(out)
    with console.current().counting(f"scoring {part.data}") as progress:
        cards, remarks = _cards(part, references, results, evaluating.metric_options(options, progress), options)
    there = [card for card in cards if card is not None]
    about = {"name": references.name, "sha256": references.fingerprint}
    score.write(there, out, {"references": about, "run": evaluating.run_of(results)})
    if options["worst"]:
        worst.write(there, out / "worst.html", options["worst"])
    for card in there:
        evaluating.remarks(card)
    return cards, remarks


def _cards(
    part: Part, references: References, results: Results, resources: Options, options: dict[str, Any]
) -> tuple[list[Card | None], list[str]]:
    """A card per goal, None where it could not be made; and why."""
    from mmi_engine.metrics import score

    cards: list[Card | None] = []
    remarks = []
    for goal in part.goals:
        name, remark = _metric(goal, resources)
        remarks += remark
        if name is None:
            cards.append(None)
            continue
        chosen = replace(resources, variant=options["parity"] or goal.variant)
        how = {"policy": options["missing"], "resamples": options["resamples"]}
        try:
            cards += score.evaluate([name], references, results, chosen, **how)
        except ManifestError as error:  # the other parts' numbers must not be lost for it
            cards.append(None)
            remarks.append(str(error))
    return cards, remarks


def _metric(goal: Goal, resources: Options) -> tuple[str | None, list[str]]:
    """The goal's metric, or what stands in for it where its network is not there."""
    need = NEEDS.get(goal.metric)
    if need is not None and getattr(resources, need) is None:
        stand_in = f"; {goal.instead} instead" if goal.instead else ""
        return goal.instead, [f"no {goal.metric} without --{need}{stand_in}"]
    if goal.metric == "miou" and resources.segmenter is None:
        return None, ["no mIoU without --segmenter"]
    return goal.metric, []


def _rows(found: Suite, part: Part, cards: list[Card | None], remarks: list[str]) -> list[dict[str, Any]]:
    """Lines of the table: every measure of the built-in world, else the one beside the paper's figure."""
    rows: list[dict[str, Any]] = []
    for goal, card in zip(part.goals, cards, strict=True):
        common = {"suite": found.name, "data": part.data, "paper": goal.paper, "remarks": remarks}
        if card is None:
            rows.append({**common, "metric": goal.metric, "measure": None})
            continue
        shown = card.measures
        if found.makes is None:
            shown = [m for m in card.measures if m.name == goal.measure] or card.measures[:1]
        same = card.metric == goal.metric
        for measure in shown:
            row = {**common, "metric": card.metric, "variant": card.variant, "measure": measure, "items": card.items}
            row["counted"] = card.items if measure.counted is None else measure.counted
            row |= {
                "problems": card.problems,
                "scale": goal.scale if same else 1.0,
                "paper": goal.paper if same else {},
            }
            rows.append(row)
    return rows


def _print(rows: list[dict[str, Any]], out: Path, suites: list[Suite], remark: str) -> None:
    from mmi_engine.metrics import overview

    terminal = console.current()
    lines: list[tuple[str, ...]] = []
    for row in rows:
        measure: Measure | None = row["measure"]
        if measure is None:
            lines.append((row["data"], row["metric"], "–", "–", "", "", "", _paper(row["paper"])))
            continue
        scale, unit = row["scale"], f" {measure.unit}" if measure.unit else ""
        places = 2 if measure.unit or abs(scale * measure.value) >= 10 else 4
        span = (
            f"{scale * measure.low:.{places}f} … {scale * measure.high:.{places}f}"
            if measure.low == measure.low
            else "–"
        )
        lost = f", {row['problems']} without result" if row["problems"] else ""
        items = row["items"] if row["counted"] == row["items"] else f"{row['counted']} of {row['items']}"
        bases = " · ".join(f"{name} {scale * value:.{places}f}" for name, value in measure.baselines.items())
        value = f"{scale * measure.value:.{places}f}{unit}"
        variant = "" if row["variant"] == "default" else " (released)"
        lines.append(
            (row["data"], row["metric"] + variant, measure.name, value, span, f"{items}{lost}", bases,
             _paper(row["paper"]))
        )  # fmt: skip
    header: tuple[str, ...] = (
        "data",
        "metric",
        "measure",
        "score",
        "95 % interval",
        "items",
        "without looking",
        "paper",
    )
    filled = [k for k in range(len(header)) if any(line[k] for line in lines)]
    lines, header = [tuple(line[k] for k in filled) for line in lines], tuple(header[k] for k in filled)
    terminal.table(lines, header=header)
    for text in dict.fromkeys(f"{row['data']}: {remark}" for row in rows for remark in row["remarks"]):
        terminal.warning(text)
    _write(rows, out, suites)
    title = suites[0].title if len(suites) == 1 else "Benchmarks"
    overview.write(out / "index.html", title, remark, header, lines, [row["data"] for row in rows])
    terminal.event("written", f"→ {out / 'index.html'}, suite.json", path=str(out / "suite.json"))


def _paper(figures: dict[str, float]) -> str:
    names = {"zero_shot": "zero-shot", "sft": "fine-tuned", "reported": ""}
    return " / ".join(f"{value:g} {names.get(name, name)}".strip() for name, value in figures.items())


def _write(rows: list[dict[str, Any]], out: Path, suites: list[Suite]) -> None:
    """``suite.json``: the table; the cards are in each part's metrics.json."""
    from mmi_engine.metrics.score import write_json
    from mmi_engine.versions import versions

    plain = []
    for row in rows:
        measure = row["measure"]
        entry = {key: value for key, value in row.items() if key != "measure"}
        if measure is not None:
            numbers = {key: getattr(measure, key) for key in ("value", "low", "high")}
            entry |= {key: value if value == value else None for key, value in numbers.items()}
            entry |= {"measure": measure.name, "unit": measure.unit}
            entry["baselines"] = {key: value if value == value else None for key, value in measure.baselines.items()}
        plain.append(entry)
    content = {"suites": [found.name for found in suites], "rows": plain, "versions": versions()}
    write_json(out / "suite.json", content)
