"""The smallest SLAM front half that is one: ~/tracks in, a camera pose a frame out. No images, no descriptors.

    python examples/track_pose.py --ros-args -r tracks:=/scfeat/tracks

Two keyframes give the essential matrix and the first landmarks; from then on PnP locates every frame, and what is new
is triangulated. Nothing is refined, no loop is closed: it drifts, in units of the distance of the first two keyframes.
"""

from __future__ import annotations

from contextlib import suppress

import cv2
import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException
from scfeat.msg import Tracks

PIXEL = 1 / 500  # rays are normalised: about one pixel at a focal length of 500
PARALLAX = 20 * PIXEL  # median motion of rays that makes two views a good base
ENOUGH = 30  # points for a pose


class Odometry:
    """``update`` takes the tracks of one frame; pose is T_camera_world (3, 4), None before the second keyframe."""

    def __init__(self) -> None:
        self._begin(np.empty(0, np.int64), np.empty((0, 2)), "")

    def _begin(self, ids: np.ndarray, rays: np.ndarray, session: str) -> None:
        """With a map and a unit of its own."""
        self.pose: np.ndarray | None = None
        self.map_ids, self.map_points = np.empty(0, np.int64), np.empty((0, 3))
        self.keyframe, self.session = (ids, rays, np.eye(3, 4)), session

    def update(self, ids: np.ndarray, rays: np.ndarray, session: str = "") -> np.ndarray | None:
        """ids: (T,), each once in a session. rays: (T, 2), undistorted, z = 1, NaN where not known. None where lost."""
        ids, rays = (values[np.isfinite(rays).all(axis=1)] for values in (ids, rays))
        _, old, new = np.intersect1d(self.keyframe[0], ids, assume_unique=True, return_indices=True)
        if session != self.session or (len(new) < ENOUGH and self._locate(ids, rays) is None):
            self._begin(ids, rays, session)
            return None
        far = len(new) > 0 and np.median(np.linalg.norm(rays[new] - self.keyframe[1][old], axis=1)) > PARALLAX
        pose = self._first_pose(old, rays[new]) if self.pose is None and far else self._locate(ids, rays)
        if pose is not None and far:
            self._triangulate(pose, ids[new], self.keyframe[1][old], rays[new])
            self.keyframe = ids, rays, pose
        self.pose = pose if pose is not None else self.pose
        return pose

    def _first_pose(self, old: np.ndarray, rays: np.ndarray) -> np.ndarray | None:
        before = self.keyframe[1][old].astype(float)
        matrix, inliers = cv2.findEssentialMat(before, rays.astype(float), np.eye(3), cv2.RANSAC, 0.999, PIXEL)
        if matrix is None or matrix.shape != (3, 3):
            return None
        count, *motion, _ = cv2.recoverPose(matrix, before, rays.astype(float), np.eye(3), mask=inliers)
        return np.hstack(motion) if count >= ENOUGH else None

    def _locate(self, ids: np.ndarray, rays: np.ndarray) -> np.ndarray | None:
        _, known, seen = np.intersect1d(self.map_ids, ids, assume_unique=True, return_indices=True)
        if len(seen) < ENOUGH:
            return None
        found, rotation, translation, inliers = cv2.solvePnPRansac(
            self.map_points[known], rays[seen].astype(float), np.eye(3), None, reprojectionError=3 * PIXEL
        )
        return np.hstack([cv2.Rodrigues(rotation)[0], translation]) if found and len(inliers) >= ENOUGH else None

    def _triangulate(self, pose: np.ndarray, ids: np.ndarray, before: np.ndarray, now: np.ndarray) -> None:
        new = ~np.isin(ids, self.map_ids)
        if not new.any():
            return
        points = cv2.triangulatePoints(self.keyframe[2], pose, before[new].T.astype(float), now[new].T.astype(float))
        points = (points[:3] / points[3]).T
        good = np.ones(len(points), bool)
        for view, seen in ((self.keyframe[2], before[new]), (pose, now[new])):
            local = points @ view[:, :3].T + view[:, 3]
            good &= (local[:, 2] > 0) & (np.linalg.norm(local[:, :2] / local[:, 2:] - seen, axis=1) < 2 * PIXEL)
        self.map_ids = np.concatenate([self.map_ids, ids[new][good]])
        self.map_points = np.concatenate([self.map_points, points[good]])


def main() -> None:
    rclpy.init()
    node = rclpy.create_node("track_pose")
    odometry = Odometry()

    def on_tracks(message: Tracks) -> None:
        ids, rays = np.array(message.ids, np.int64), np.array(message.rays, np.float32).reshape(-1, 2)
        pose = odometry.update(ids, rays, message.session) if len(rays) == len(ids) else None
        where = "no pose" if pose is None else f"position {np.round(-pose[:, :3].T @ pose[:, 3], 3)}"
        print(f"{message.header.stamp.sec}.{message.header.stamp.nanosec:09d} {len(ids)} tracks, {where}", flush=True)

    node.create_subscription(Tracks, "tracks", on_tracks, 10)
    with suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.spin(node)


if __name__ == "__main__":
    main()
