"""scfeat_ros: the robot side of scfeat. Converts, hands over and publishes; all mathematics is in scfeat_core."""
