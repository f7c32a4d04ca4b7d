#!/usr/bin/env bash
# Runs a command with ROS and the workspace set up.
set -e
source "/opt/ros/${ROS_DISTRO}/setup.bash"
source /workspace/install/setup.bash
exec "$@"
