"""What a replay must reach: conditions on the flat figures of its summary."""

from __future__ import annotations

from scfeat_core.checks import Check, Verdict, check_names, failed, judge, parse

__all__ = ["Check", "Verdict", "check_names", "failed", "judge", "parse"]
