"""The page that lists the refusals lists what the code says."""

import ast
import re
from pathlib import Path

from tests.contract.test_random_controllers import REFUSALS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([NVR]) \| `(.+?)` \|", re.MULTILINE)


def texts():
    """Return all texts of the engine; what is filled in is written …"""
    found = []
    for file in (ROOT / "warp_phys").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
    return found


def test_the_page_quotes_messages_that_there_are():
    rows, known = ROW.findall(PAGE), texts()
    assert len(rows) >= 18
    assert [message for _, message in rows if not any(message in text for text in known)] == []


def test_the_page_has_all_that_random_controllers_run_into():
    messages = [message for _, message in ROW.findall(PAGE)]
    for refusal in REFUSALS:
        assert any(re.search(refusal, message) for message in messages), refusal
