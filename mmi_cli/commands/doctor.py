"""`mmi doctor`: what is installed, what it runs on, and what to do about problems."""

from __future__ import annotations

from dataclasses import asdict

import click

from mmi_cli import console
from mmi_cli.options import SETTINGS, message_options


@click.command("doctor", context_settings=SETTINGS, epilog="Example:\n\n  mmi doctor --json")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@message_options
def doctor(as_json: bool) -> int:
    """Look over versions, devices, kernels, the embedded model and memory; each problem with its remedy.

    Exit code 1 when there is a problem.
    """
    from mmi_engine.versions import examine

    findings = examine()
    problems = [finding for finding in findings if finding.problem]
    terminal = console.current()
    if as_json:
        terminal.json({"ok": not problems, "findings": [asdict(finding) for finding in findings]})
    else:
        terminal.table([("!" if finding.problem else " ", finding.name, finding.value) for finding in findings])
        for finding in problems:
            terminal.out(f"! {finding.name}: {finding.value}; {finding.remedy}")
        terminal.out("no problems found" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0
