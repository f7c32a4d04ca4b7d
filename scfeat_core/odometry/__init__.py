"""Monocular visual odometry on what the front end publishes, and how good it is."""

from scfeat_core.odometry.estimation import Odometry, estimate
from scfeat_core.odometry.trajectory import TrajectoryScores, evaluate

__all__ = ["Odometry", "TrajectoryScores", "estimate", "evaluate"]
