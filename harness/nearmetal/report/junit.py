# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks of a run as JUnit XML."""

from __future__ import annotations

from xml.etree import ElementTree

from ..core.model import CheckResult, Report
from ..core.text import first_line, printable
from ..measure import registry

_TAGS = {"fail": "failure", "error": "error", "skip": "skipped"}


def junit(report: Report) -> str:
    """The checks as JUnit XML: one test case a check, its class named after the test.

    Valid by Ant's schema (the common one) and by that of Jenkins' xUnit plugin: they are
    the reason for attributes and empty elements that say little.
    """
    run = report.run
    counts = {
        "tests": len(report.checks),
        "failures": sum(check.status == "fail" for check in report.checks),
        "errors": sum(check.status == "error" for check in report.checks),
        "skipped": sum(check.status == "skip" for check in report.checks),
    }
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": "checks",
            "package": "nearmetal",
            "id": "0",
            "timestamp": run.started[:19],
            "hostname": printable(run.host),
            "time": f"{run.seconds:.3f}",
            **{key: str(value) for key, value in counts.items()},
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in (("run", run.id), ("host", run.host), ("command", run.command)):
        ElementTree.SubElement(properties, "property", name=key, value=printable(value))
    for check in report.checks:
        _case(suite, check)
    for tag in ("system-out", "system-err"):
        ElementTree.SubElement(suite, tag)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, check: CheckResult) -> None:
    case = ElementTree.SubElement(
        suite,
        "testcase",
        name=printable(check.name),
        classname=f"nearmetal.{family(check.name)}",
        time="0",
    )
    if check.status == "pass":
        return
    found = ElementTree.SubElement(
        case, _TAGS[check.status], message=printable(first_line(check.reason))
    )
    if check.status != "skip":
        found.set("type", check.status)
    found.text = printable(
        f"expected: {check.expected}\nobserved: {check.observed or 'nothing'}\n{check.reason}\n"
    )


def family(check_name: str) -> str:
    """The family of measurements that a check's name begins with, else ``checks``."""
    words = check_name.removeprefix("measured:").replace(":", ".").split(".")
    families = {*registry.tests(), *(name.partition(".")[0] for name in registry.metrics())}
    return words[0] if words[0] in families else "checks"
