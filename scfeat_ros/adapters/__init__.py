"""What other SLAM systems take instead of scfeat's own messages: pure functions, and a thin node around each."""
