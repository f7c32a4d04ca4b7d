"""Monocular visual odometry on what the front end publishes, and how good it is."""

from scfeat_core.odometry.estimation import Odometry, estimate

__all__ = ["Odometry", "estimate"]
