"""The rules of agreement in C++, one text for every kernel that combines updates."""

from typing import Any

from warp_phys.flow import agree, geometric, minmod

RULES: dict[Any, str] = {
    agree: "m",
    geometric: "wp::sign(m) * (wp::sqrt(wp::abs(m)) * wp::sqrt(wp::abs(r)))",
    minmod: "wp::abs(m) < wp::abs(r) ? m : r",
}
"""What a rule of `flow` gives for two numbers m and r whose signs agree."""


def combined_body(rule: Any) -> str:
    """Return the C++ that returns what a rule makes of numbers m and r: nan where their sum is, 0 where signs differ.

    Raises:
        KeyError: The rule is none of `RULES`.
    """
    return f"""
        const auto sum = m + r;
        const bool same = (m > 0) == (r > 0) && (m < 0) == (r < 0);
        if (sum != sum || !same) return sum != sum ? sum : 0;
        return {RULES[rule]};
    """
