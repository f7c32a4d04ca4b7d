"""The files of bags, read so that what is damaged costs only itself: mcap, sqlite3 and ROS 1.

The readers of ``rosbags`` and of rosbag2 end at the first damaged byte; these skip what cannot be trusted, go on behind
it and say what was lost. Nothing of ROS is imported.
"""
