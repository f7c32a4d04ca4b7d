"""What a replay leaves behind, and what is made of it: metrics, trajectory, report, comparison, without bags."""
