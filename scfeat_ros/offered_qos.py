"""How the topics of a rosbag2 were offered when it was recorded, as its metadata.yaml says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# The values of rmw (rmw/types.h) as older bags have them, and the words of later ones.
_BEST_EFFORT = (2, "2", "best_effort")
_TRANSIENT_LOCAL = (1, "1", "transient_local")


@dataclass(frozen=True)
class Offer:
    """The profile of one publisher. depth: of its history. reliable: it sends again. kept: for late joiners."""

    depth: int = 0
    reliable: bool = True
    kept: bool = False


def read_offers(path: Path) -> dict[str, list[Offer]]:
    """Topic -> the profiles of its publishers. path: the folder of a rosbag2, or a file in it.

    Empty where it is not said: by an older recorder, by a ROS 1 bag, or as the metadata is missing or damaged.
    """
    file = (path if path.is_dir() else path.parent) / "metadata.yaml"
    try:
        info = _load(file.read_text(encoding="utf-8"))["rosbag2_bagfile_information"]
        if path.is_file() and path.name not in info["relative_file_paths"]:
            return {}  # the metadata of another bag
        topics = [entry["topic_metadata"] for entry in info["topics_with_message_count"]]
        return {topic["name"]: _offers(topic.get("offered_qos_profiles")) for topic in topics}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def merged(offers: Sequence[Offer]) -> Offer:
    """What one publisher must offer in the place of several: reliable, or kept for late joiners, only where all of them
    were, as ``ros2 bag play`` does it; without any, reliable and not kept, which serves both kinds of subscriptions.
    """
    reliable = all(offer.reliable for offer in offers)
    kept = bool(offers) and all(offer.kept for offer in offers)
    return Offer(max((offer.depth for offer in offers), default=0), reliable, kept)


def _load(text: str) -> Any:
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _offers(profiles: Any) -> list[Offer]:
    """profiles: a list, or the YAML of one as a text, which versions before 9 of the metadata have."""
    if isinstance(profiles, str):
        profiles = _load(profiles)
    return [_offer(profile) for profile in profiles or ()]


def _offer(profile: Mapping[str, Any]) -> Offer:
    depth = int(profile.get("depth") or 0)
    return Offer(
        depth, _word(profile, "reliability") not in _BEST_EFFORT, _word(profile, "durability") in _TRANSIENT_LOCAL
    )


def _word(profile: Mapping[str, Any], name: str) -> Any:
    value = profile.get(name)
    return value.lower() if isinstance(value, str) else value
