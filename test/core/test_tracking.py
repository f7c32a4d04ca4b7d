from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scfeat_core import tracking
from scfeat_core.geometry import undistort_points
from scfeat_core.inertial import exponential
from scfeat_core.matching import match_descriptors
from scfeat_core.tracking import Links, Motion, TrackManager, View, neighbours, predict, turn
from scfeat_core.types import Camera, Features, TrackFlag, Tracks

SIZE = (640, 480)
SECOND = 1_000_000_000
SETTINGS = {"max_gap": 3, "min_cosine": 0.8}


class World:
    """Points with descriptors of their own that drift over the image; who is seen in a frame is up to the test."""

    def __init__(self, count: int = 60, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.start = rng.uniform(150, 400, (count, 2)).astype(np.float32)
        generator = torch.Generator().manual_seed(seed)
        self.descriptors = F.normalize(torch.randn(count, 64, generator=generator), dim=1)
        self.velocity = np.array([30.0, -10.0], np.float32)  # pixels a second
        self._rng = rng

    def positions(self, seconds: float) -> np.ndarray:
        return self.start + self.velocity * np.float32(seconds)

    def view(self, sequence: int, who: np.ndarray, rays: bool = True) -> View:
        """Frame ``sequence``, ten a second, with the points ``who`` in that order."""
        keypoints = self.positions(sequence / 10)[who]
        descriptors = self.descriptors[torch.from_numpy(who)]
        features = Features(keypoints, np.ones(len(who), np.float32), descriptors.numpy(), SIZE)
        return View(sequence, sequence * SECOND // 10, features, descriptors, keypoints / 500 if rays else None)


def links(sequence0: int, who0: np.ndarray, who1: np.ndarray) -> Links:
    """The true ones."""
    _, indices0, indices1 = np.intersect1d(who0, who1, return_indices=True)
    return Links(sequence0, indices0, indices1)


def run(world: World, frames: list[np.ndarray], manager: TrackManager | None = None, **settings) -> list[Tracks]:
    manager = TrackManager() if manager is None else manager
    results = []
    for sequence, who in enumerate(frames):
        link = links(sequence - 1, frames[sequence - 1], who) if sequence else None
        results.append(manager.update(world.view(sequence, who), link, **{**SETTINGS, **settings}))
    return results


def identity(tracks: Tracks, who: np.ndarray) -> dict[int, int]:
    """Point of the world -> id."""
    return dict(zip(who[tracks.indices].tolist(), tracks.ids.tolist(), strict=True))


def shuffled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


# -- identities --------------------------------------------------------------------------------------------------------


def test_points_keep_their_id_in_whatever_order_they_are_seen():
    world = World()
    frames = [shuffled(60, seed) for seed in range(4)]
    results = run(world, frames)
    assert results[0].ids.tolist() == list(range(1, 61))
    for step, (tracks, who) in enumerate(zip(results, frames, strict=True)):
        assert identity(tracks, who) == identity(results[0], frames[0])
        assert (tracks.ages == step + 1).all() and (np.diff(tracks.ids.astype(int)) > 0).all()
        assert np.array_equal(tracks.keypoints, world.positions(step / 10)[who][tracks.indices])
        assert (tracks.flags == (TrackFlag.NEW if step == 0 else 0)).all() and len(tracks.lost_ids) == 0
    kinds = [
        a.dtype for a in (tracks.ids, tracks.ages, tracks.indices, tracks.keypoints, tracks.rays, tracks.velocities)
    ]
    assert kinds == [np.uint32, np.uint32, np.int64, np.float32, np.float32, np.float32]
    assert (tracks.flags.dtype, tracks.lost_ids.dtype) == (np.uint8, np.uint32)


def test_velocities_are_those_of_the_rays():
    world = World()
    everybody = np.arange(60)
    first, second, third = run(world, [everybody[:50], everybody, everybody])
    assert first.velocities is None, "nothing was seen to move yet"
    old = second.flags == 0
    np.testing.assert_allclose(second.velocities[old], np.broadcast_to(world.velocity / 500, (50, 2)), atol=1e-5)
    assert not second.velocities[~old].any() and (second.flags[~old] == TrackFlag.NEW).all()
    np.testing.assert_allclose(third.velocities, np.broadcast_to(world.velocity / 500, (60, 2)), atol=1e-5)


def test_without_calibration_there_are_no_rays():
    world, manager, who = World(), TrackManager(), np.arange(60)
    manager.update(world.view(0, who, rays=False), None, **SETTINGS)
    bare = manager.update(world.view(1, who, rays=False), links(0, who, who), **SETTINGS)
    assert bare.rays is None and bare.velocities is None and (bare.ages == 2).all()
    calibrated = manager.update(world.view(2, who), links(1, who, who), **SETTINGS)
    assert not calibrated.velocities.any(), "the rays before are not known"
    assert manager.update(world.view(3, who), links(2, who, who), **SETTINGS).velocities.any()


def test_a_ray_that_is_not_known_has_no_velocity():
    world, manager, who = World(), TrackManager(), np.arange(60)
    view = world.view(0, who)
    view.rays[3] = np.nan
    manager.update(view, None, **SETTINGS)
    tracks = manager.update(world.view(1, who), links(0, who, who), **SETTINGS)
    assert np.flatnonzero(~tracks.velocities.any(1)).tolist() == [3] and np.isfinite(tracks.velocities).all()


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_a_point_comes_back_after_a_gap(gap):
    world = World()
    everybody, most = np.arange(60), np.arange(20, 60)
    frames = [everybody, everybody, *[most] * gap, shuffled(60, 5)]
    results = run(world, frames)
    assert identity(results[-1], frames[-1]) == identity(results[0], everybody)
    back = frames[-1][results[-1].indices] < 20
    assert (results[-1].flags == np.where(back, TrackFlag.REIDENTIFIED, 0)).all()
    assert (results[-1].ages == np.where(back, 3, 3 + gap)).all()
    np.testing.assert_allclose(results[-1].velocities[back], np.broadcast_to(world.velocity / 500, (20, 2)), atol=1e-5)
    assert all(len(tracks.lost_ids) == 0 for tracks in results)


def test_a_point_that_was_away_for_longer_is_a_new_one_and_its_track_has_ended():
    world = World()
    everybody, most = np.arange(60), np.arange(20, 60)
    results = run(world, [everybody, *[most] * 4, everybody])
    gone = [i for who, i in identity(results[0], everybody).items() if who < 20]
    assert [sorted(tracks.lost_ids.tolist()) for tracks in results] == [[], [], [], [], gone, []]
    now = identity(results[-1], everybody)
    assert min(now[who] for who in range(20)) > 60, "what has ended does not come back"


def test_without_a_gap_tracks_end_at_once():
    world = World()
    everybody, most = np.arange(60), np.arange(20, 60)
    results = run(world, [everybody, most, everybody], max_gap=0)
    assert len(results[1].lost_ids) == 20 and (results[2].flags == TrackFlag.REIDENTIFIED).sum() == 0


def test_what_was_there_a_frame_ago_and_was_not_linked_is_not_brought_back_by_its_descriptor():
    world, manager, who = World(), TrackManager(), np.arange(60)
    manager.update(world.view(0, who), None, **SETTINGS)
    tracks = manager.update(world.view(1, who), links(0, who, who[10:]), **SETTINGS)
    assert (tracks.flags == TrackFlag.NEW).sum() == 10, "the geometry has refused them"


def test_a_lost_point_must_look_alike_and_be_where_it_is_expected():
    world = World()
    everybody, most = np.arange(60), np.arange(20, 60)
    manager = TrackManager()
    manager.update(world.view(0, everybody), None, **SETTINGS)
    manager.update(world.view(1, most), links(0, everybody, most), **SETTINGS)
    view = world.view(2, everybody)
    keypoints, descriptors = view.features.keypoints.copy(), view.descriptors.clone()
    keypoints[:5] += [0, 14]  # more than 2 % of 640
    keypoints[5:10] += [12, -12]
    descriptors[10:15] = F.normalize(descriptors[10:15] + 0.16 * torch.randn(5, 64), dim=1)
    view = replace(view, features=replace(view.features, keypoints=keypoints), descriptors=descriptors)
    alike = (descriptors[10:15] * world.descriptors[10:15]).sum(1)
    tracks = manager.update(view, links(1, most, everybody), **{**SETTINGS, "min_cosine": float(alike.max()) + 1e-3})
    new = everybody[tracks.indices][tracks.flags == TrackFlag.NEW]
    assert sorted(new.tolist()) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


def test_lost_points_are_expected_where_the_motion_around_them_has_taken_them():
    """60 pixels a frame over four frames: far from where they were lost."""
    world = World()
    world.velocity = np.array([-300.0, 200.0], np.float32)
    everybody, most = np.arange(60), np.arange(20, 60)
    results = run(world, [everybody, *[most] * 3, everybody])
    assert (results[-1].flags == TrackFlag.REIDENTIFIED).sum() == 20


@pytest.mark.parametrize("gap", [1, 2])
def test_a_dark_frame_does_not_end_all_tracks(gap):
    """Nothing of what is seen there is true; the points are expected where they were going."""
    world = World()
    world.velocity = np.array([-300.0, 200.0], np.float32)
    everybody = np.arange(60)
    manager = TrackManager()
    first = manager.update(world.view(0, everybody), None, **SETTINGS)
    manager.update(world.view(1, everybody), links(0, everybody, everybody), **SETTINGS)
    noise = World(80, seed=9)
    for step in range(2, 2 + gap):
        manager.update(noise.view(step, np.arange(80)), Links(step - 1, np.arange(4), np.arange(4)), **SETTINGS)
    nothing = Links(1 + gap, np.zeros(0, np.int64), np.zeros(0, np.int64))
    tracks = manager.update(world.view(2 + gap, everybody), nothing, **SETTINGS)
    back = identity(tracks, everybody)
    assert [back[who] for who in range(4, 60)] == [identity(first, everybody)[who] for who in range(4, 60)]


def test_twins_are_told_apart_by_their_place():
    world = World()
    world.start[0], world.start[1] = (200, 200), (300, 300)
    world.descriptors[1] = world.descriptors[0]
    everybody, most = np.arange(60), np.arange(20, 60)
    results = run(world, [everybody, most, everybody[::-1].copy()])
    assert identity(results[2], everybody[::-1]) == identity(results[0], everybody)


def test_a_reset_ends_all_tracks_and_ids_go_on():
    world, manager, who = World(), TrackManager(), np.arange(60)
    manager.update(world.view(0, who), None, **SETTINGS)
    manager.update(world.view(1, who[20:]), links(0, who, who[20:]), **SETTINGS)
    manager.reset()
    manager.reset()
    tracks = manager.update(world.view(2, who), None, **SETTINGS)
    assert sorted(tracks.lost_ids.tolist()) == list(range(1, 61)), "those that waited, too"
    assert tracks.ids.tolist() == list(range(61, 121)) and tracks.velocities is None
    assert len(manager.update(world.view(3, who), links(2, who, who), **SETTINGS).lost_ids) == 0


def test_links_of_another_frame_are_not_followed():
    world, manager, who = World(), TrackManager(), np.arange(60)
    first = manager.update(world.view(0, who), None, **SETTINGS)
    mixed = shuffled(60, 1)
    tracks = manager.update(world.view(2, mixed), Links(1, who, who), **SETTINGS)
    assert identity(tracks, mixed) == identity(first, who), "frame 1 had no tracks: descriptors decide"
    assert (tracks.flags == TrackFlag.REIDENTIFIED).all()


@pytest.mark.parametrize("counts", [(60, 0, 60), (0, 60, 60), (0, 0, 0), (60, 1, 60)])
def test_frames_without_points(counts):
    world = World()
    frames = [np.arange(count) for count in counts]
    results = run(world, frames)
    assert [len(tracks) for tracks in results] == list(counts)
    if counts == (60, 0, 60):
        assert identity(results[2], frames[2]) == identity(results[0], frames[0])


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(tracking, "_MAX_WAITING", 100)
    world = World(2000)
    manager = TrackManager()
    ended = 0
    for step in range(20):
        who = np.arange(100 * step, 100 * step + 60)
        ended += len(manager.update(world.view(step, who), None, max_gap=1000, min_cosine=1.0).lost_ids)
    assert len(manager._pool.ids) == len(manager._pool.descriptors) == 160
    assert ended == 20 * 60 - 160
    assert manager._pool.ids[60:].min() > 1000, "the last ones wait"


def test_ids_that_are_used_up_begin_a_new_epoch():
    world, manager, who = World(), TrackManager(), np.arange(60)
    manager._next = 2**32 - 61
    first = manager.update(world.view(0, who), None, **SETTINGS)
    assert (first.ids.max(), first.epoch) == (2**32 - 2, 0)
    second = manager.update(world.view(1, who), links(0, who, who), **SETTINGS)
    assert (second.ids.tolist(), second.epoch, len(second.lost_ids)) == (list(range(1, 61)), 1, 0)


def test_no_id_is_ever_given_twice_and_every_track_ends_once():
    """Points that come and go at random, wrong links among the right ones, resets."""
    rng = np.random.default_rng(7)
    world, manager = World(80), TrackManager()
    alive: set[int] = set()
    ended: set[int] = set()
    before = None
    for step in range(120):
        if step % 37 == 36:
            manager.reset()
            before = None
        who = np.flatnonzero(rng.random(80) < 0.7)
        link = None if before is None else links(step - 1, before, who)
        if link is not None and len(link.indices0) > 4:
            link.indices1[:4] = np.roll(link.indices1[:4], 1)
        tracks = manager.update(world.view(step, who), link, **SETTINGS)
        now, lost = set(tracks.ids.tolist()), set(tracks.lost_ids.tolist())
        assert len(now) == len(tracks) == len(who) and len(lost) == len(tracks.lost_ids)
        assert not now & ended and not lost & ended and not now & lost
        new = set(tracks.ids[tracks.flags == TrackFlag.NEW].tolist())
        assert new == now - alive
        alive = (alive | now) - lost
        ended |= lost
        before = who
    assert max(now) == len(alive) + len(ended)


# -- motion ------------------------------------------------------------------------------------------------------------


def moving(points: np.ndarray, steps: np.ndarray, indices: np.ndarray, own: np.ndarray | None = None) -> Motion:
    return Motion(indices, points[indices], steps[indices], None if own is None else own[indices], 0.1)


def test_points_go_on_as_they_did_and_others_as_their_neighbours():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 640, (300, 2)).astype(np.float32)
    zoom = (points - 320) * np.float32(0.05)
    known = np.arange(200)
    found = predict(points, moving(points, zoom, known), 0.2, None)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:200], points[:200] + 2 * zoom[:200], atol=1e-4)
    error = np.linalg.norm(found - points - 2 * zoom, axis=1)[200:]
    assert np.median(error) < 4 < 0.2 * np.median(np.linalg.norm(2 * zoom, axis=1))


@pytest.mark.parametrize(("count", "known"), [(1, 5), (50, 5), (2500, 128), (300, 400), (40, 3), (40, 1), (0, 9)])
def test_neighbours_by_definition(count, known):
    """The lower median of each component, of those that are nearest; distances are told apart to 1 in 60000."""
    rng = np.random.default_rng(count + known)
    points, places = (rng.uniform(0, 640, (number, 2)).astype(np.float32) for number in (count, known))
    values = rng.normal(size=(known, 2)).astype(np.float32)
    found = neighbours(points, places, values)
    step = -(-known // 128)
    places, values = places[::step], values[::step]
    assert found.shape == (count, 2) and found.dtype == np.float32
    for point, each in zip(points, found, strict=True):
        distance = ((point - places).astype(np.float64) ** 2).sum(1)
        order = distance.argsort()
        nearest = order[:5]
        if len(order) > 5 and distance[order[5]] < distance[order[4]] * (1 + 1e-4):
            continue
        expected = np.sort(values[nearest], axis=0)[(len(nearest) - 1) // 2]
        np.testing.assert_array_equal(each, expected)


def test_a_few_wrong_neighbours_do_not_matter():
    rng = np.random.default_rng(0)
    known = rng.uniform(0, 640, (120, 2)).astype(np.float32)
    steps = np.full((120, 2), 7, np.float32)
    steps[::10] = 300
    found = neighbours(rng.uniform(0, 640, (50, 2)).astype(np.float32), known, steps)
    assert found.shape == (50, 2) and (found == 7).all(1).mean() > 0.95
    assert np.array_equal(neighbours(known[:3], known[5:6], steps[5:6]), steps[[5, 5, 5]]), "a single one"


@pytest.mark.parametrize("known", [1, 2, 40, 600])
def test_many_points_move_as_the_middle_of_their_cell(known):
    """A zoom of 10 % a second: within the motion over half a cell of what each point's own neighbours say."""
    rng = np.random.default_rng(known)
    places = (rng.uniform(0, 1, (known, 2)) * (1240, 376)).astype(np.float32)
    flow = tracking._Flow(places, np.float32(0.1) * (places - places.mean(0)))
    points = (rng.uniform(-0.3, 1.3, (4000, 2)) * (1240, 376)).astype(np.float32)
    found, exact = tracking._rates(points, flow), neighbours(points, flow.points, flow.rates)
    assert found.shape == (4000, 2) and found.dtype == np.float32
    seen = ((points >= places.min(0)) & (points <= places.max(0))).all(1)
    side = np.sqrt(1240 * 376 / tracking._CELLS)
    assert (
        np.abs(found - exact)[seen].max(initial=0) < 0.1 * 8 * side and np.median(np.abs(found - exact)) < 0.05 * side
    )
    np.testing.assert_array_equal(tracking._rates(points[:9], flow), exact[:9], "few points ask their own neighbours")
    points[:3] = [[np.nan, 0], [np.inf, -np.inf], [1e30, -1e30]]
    assert np.isfinite(tracking._rates(points, flow)).all()


def test_nothing_is_predicted_from_nothing():
    points = np.ones((5, 2), np.float32)
    assert predict(points, None, 0.1, None) is None
    nobody = np.zeros(0, np.int64)
    assert predict(points, moving(points, points, nobody), 0.1, None) is None
    turned = points + 3
    assert np.array_equal(predict(points, None, 0.1, turned), turned)
    assert np.array_equal(predict(points, moving(points, points, np.arange(5)), 0.1, turned), turned), (
        "what part of the steps was rotation is not known"
    )


def test_a_known_rotation_replaces_the_one_before():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 640, (30, 2)).astype(np.float32)
    own = np.full((30, 2), 2, np.float32)
    motion = moving(points, own + 50, np.arange(30), own)
    turned = points - 40
    np.testing.assert_allclose(predict(points, motion, 0.1, turned), points - 38, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "distortion"),
    [("plumb_bob", [-0.28, 0.07, 0.0002, 1e-5, 0]), ("equidistant", [-0.01, 0.02, -0.01, 0.002]), ("", [])],
)
def test_a_turn_moves_pixels_as_projection_says(model, distortion):
    camera = Camera(
        np.array([[458.0, 0, 367], [0, 457, 248], [0, 0, 1]]), np.array(distortion, float), (752, 480), model
    )
    rotation = exponential(np.array([[0.02, -0.05, 0.1]]))[0]
    x, y = np.meshgrid(np.linspace(150, 600, 8), np.linspace(100, 400, 6))
    points = np.stack([x.ravel(), y.ravel()], -1)
    rays = undistort_points(points, camera)
    world = np.column_stack((rays, np.ones(len(rays))))
    project = cv2.fisheye.projectPoints if model == "equidistant" else cv2.projectPoints
    vector = cv2.Rodrigues(rotation)[0]
    expected = project(world[:, None], vector, np.zeros(3), camera.K, camera.D)[0].reshape(-1, 2)
    found = turn(rays, rotation, camera)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)
    np.testing.assert_allclose(turn(rays, np.eye(3), camera), points, atol=1e-2)
    behind = turn(rays, exponential(np.array([[0, np.pi, 0]]))[0], camera)
    assert np.isnan(behind).all()


# -- a longer sequence -------------------------------------------------------------------------------------------------


def test_flickering_points_make_long_tracks():
    """Points are detected in 4 of 5 frames, with noise; matching is the real one. Without re-identification tracks are
    as long as the runs between two misses, with it they last, and they are right."""
    lengths = {}
    for gap in (0, 3):
        rng = np.random.default_rng(1)
        world, manager = World(200), TrackManager()
        owners: dict[int, set[int]] = {}
        ages: dict[int, int] = {}
        before: View | None = None
        for step in range(40):
            who = rng.permutation(np.flatnonzero(rng.random(200) < 0.8))
            view = world.view(step, who)
            noise = 0.05 * torch.from_numpy(rng.normal(size=(len(who), 64))).float()
            view = replace(view, descriptors=F.normalize(view.descriptors + noise, dim=1))
            link = None
            if before is not None:
                matches = match_descriptors(before.descriptors, view.descriptors, min_cosine=0.7).numpy()
                link = Links(step - 1, matches.indices0, matches.indices1)
            tracks = manager.update(view, link, max_gap=gap, min_cosine=0.7)
            for track, age, point in zip(tracks.ids.tolist(), tracks.ages.tolist(), who[tracks.indices], strict=True):
                owners.setdefault(track, set()).add(int(point))
                ages[track] = age
            before = view
        assert all(len(points) == 1 for points in owners.values()), "a track is one point"
        lengths[gap] = float(np.mean(list(ages.values())))
    assert lengths[0] < 6 and lengths[3] > 25
