"""`mmi verify`: the numbers of this installation and device against golden values of the released implementation."""

from __future__ import annotations

from pathlib import Path

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, message_options


@click.command("verify", context_settings=SETTINGS, epilog="Example:\n\n  mmi verify")
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path), metavar="[BUNDLE]...")
@click.option(
    "--kernel",
    type=click.Choice(["auto", "cuda", "torch", "numba"]),
    default="auto",
    show_default=True,
    help="Deformable-sampling kernel to check.",
)
@click.option("--all", "show_all", is_flag=True, help="Show every tensor instead of the worst one of each case.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@message_options
def verify(bundles: tuple[Path, ...], kernel: str, show_all: bool, as_json: bool) -> int:
    """Check the numbers of this installation against golden bundles (default: the one that ships).

    Prints case, tensor, largest absolute and relative error and the verdict; failed tensors are always listed. A golden
    tensor that cannot be compared is a failure. Exit code 0 only if everything passes.
    """
    from mmi_engine.verify.cases import SHIPPED, verify

    terminal = console.current()
    rows, documents, passed = [("case", "tensor", "abs error", "rel error", "")], [], True
    for bundle in bundles or (SHIPPED,):
        for report in verify(bundle, backend=kernel, started=lambda name: terminal.notice(f"running {name}")):
            passed = passed and report.passed
            worst = max(report.rows, key=lambda row: row.relative)
            shown = [row for row in report.rows if show_all or row is worst or not row.passed]
            rows += [
                (row.case, row.tensor, f"{row.absolute:.1e}", f"{row.relative:.1e}", _verdict(row.passed, row.note))
                for row in shown
            ]
            rows.append((report.case, f"{len(report.rows)} tensors", "", "", _verdict(report.passed, "")))
            documents += [
                {k: None if v == float("inf") or v != v else v for k, v in vars(row).items()} for row in report.rows
            ]
    if as_json:
        terminal.json({"ok": passed, "tensors": documents})
    else:
        terminal.table(rows)
        terminal.out("all passed" if passed else "FAILED: this installation computes other numbers")
    return 0 if passed else 1


def _verdict(passed: bool, note: str) -> str:
    return "pass" if passed else f"FAIL {note}".strip()
