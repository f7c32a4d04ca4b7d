"""Publishers and subscriptions: their QoS, what the user overrides of it, and what is said where two do not fit.

Every endpoint takes ``qos_overrides.<topic>.<publisher|subscription>.<policy>``. Inputs start as sensor data, which any
publisher can serve, and follow the publishers from then on: where all of them send reliably, large images are asked
for again when a part is lost; where all of them keep their last message for late joiners, as latched calibrations and
static masks do, it is asked for. A policy that the user has set is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rclpy.exceptions import ParameterException
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    InvalidQoSProfileException,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
    qos_policy_name_from_kind,
)
from rclpy.qos_overriding_options import QoSOverridingOptions

from scfeat_core.errors import ConfigError

try:
    from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
except ModuleNotFoundError:  # Humble
    from rclpy.qos_event import PublisherEventCallbacks, SubscriptionEventCallbacks

POLICIES = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY, QoSPolicyKind.DURABILITY)
RELIABLE, BEST_EFFORT = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT
LATCHED, VOLATILE = DurabilityPolicy.TRANSIENT_LOCAL, DurabilityPolicy.VOLATILE
Complain = Callable[[str], None]
NAMING = 2.0  # seconds after which a report does without the name of a node: discovery may tell it after the event
UNNAMED = "_NODE_NAME_UNKNOWN_"  # what rcl says until then


def qos(depth: int, reliability: Any, durability: Any = VOLATILE) -> QoSProfile:
    """A new profile each time: rclpy writes the overrides of one endpoint into the profile that it is given."""
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=depth, reliability=reliability, durability=durability)


def following(offers: Iterable[QoSProfile], depth: int, latched: bool) -> QoSProfile:
    """What to ask for so that all publishers can serve it, and none serves it worse than it could.

    latched: an old message is worth having (a calibration, a mask; not an image).
    """
    offers = list(offers)
    reliable = bool(offers) and all(offer.reliability == RELIABLE for offer in offers)
    kept = latched and bool(offers) and all(offer.durability == LATCHED for offer in offers)
    return qos(depth, RELIABLE if reliable else BEST_EFFORT, LATCHED if kept else VOLATILE)


@dataclass(eq=False)
class Input:
    """A subscription with all that is needed to make it again."""

    kind: Any
    name: str  # as rclpy takes it: whatever it is given it expands and remaps, so this must not have happened before
    topic: str  # what that becomes
    callback: Callable[[Any], None]
    depth: int
    latched: bool
    complain: Complain
    subscription: Any = None

    @property
    def profile(self) -> QoSProfile:
        return self.subscription.qos_profile


@dataclass(frozen=True)
class _Report:
    """Of a QoS that does not fit. explain: the text, or None where nothing is wrong any more, and who is meant."""

    complain: Complain
    explain: Callable[[], tuple[str | None, str]]
    since: float


class Endpoints:
    """The publishers and subscriptions of a lifecycle node; belongs to the thread of its executor."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self.inputs: list[Input] = []
        self.outputs: list[Any] = []
        self._reports: list[_Report] = []

    def publish(self, kind: Any, name: str, complain: Complain, *, always: bool = False) -> Any:
        """A publisher, silent while the node is inactive unless ``always``. name: before it is remapped.

        Raises ConfigError for a bad override.
        """
        create = self._node.create_publisher if always else self._node.create_lifecycle_publisher
        events = PublisherEventCallbacks(
            incompatible_qos=lambda event: self._note(complain, lambda: self._refused(publisher, name, event))
        )
        topic = self._node.resolve_topic_name(name)
        publisher = self._create(create, topic, kind, name, qos(5, RELIABLE), event_callbacks=events)
        self.outputs.append(publisher)
        return publisher

    def subscribe(
        self,
        kind: Any,
        name: str,
        callback: Callable[[Any], None],
        complain: Complain,
        *,
        depth: int = 1,
        latched: bool = False,
    ) -> Input:
        """A subscription that follows its publishers. name: before it is remapped.

        Raises ConfigError for a bad override.
        """
        added = Input(kind, name, self._node.resolve_topic_name(name), callback, depth, latched, complain)
        self._connect(added, following(self._offers(added), depth, latched), declare=True)
        self.inputs.append(added)
        return added

    def follow(self) -> None:
        """Make the subscriptions again whose publishers allow, or need, another QoS by now; say what does not fit."""
        for item in self.inputs:
            offers = self._offers(item)
            if not offers:
                continue
            wanted = self._overridden(item.topic, following(offers, item.depth, item.latched))
            if (wanted.reliability, wanted.durability) != (item.profile.reliability, item.profile.durability):
                self._node.destroy_subscription(item.subscription)
                self._connect(item, wanted, declare=False)

        self._tell()

    def _note(self, complain: Complain, explain: Callable[[], tuple[str | None, str]]) -> None:
        self._reports.append(_Report(complain, explain, time.monotonic()))

    def _tell(self) -> None:
        waiting, self._reports = self._reports, []
        for report in waiting:
            text, names = report.explain()
            if text is None:
                continue
            if names or time.monotonic() - report.since > NAMING:
                report.complain(text)
            else:
                self._reports.append(report)

    def close_inputs(self) -> None:
        while self.inputs:
            self._node.destroy_subscription(self.inputs.pop().subscription)

    def close_outputs(self) -> None:
        self._reports.clear()
        while self.outputs:
            self._node.destroy_lifecycle_publisher(self.outputs.pop())  # takes plain publishers, too

    def _connect(self, item: Input, profile: QoSProfile, declare: bool) -> None:
        events = SubscriptionEventCallbacks(
            incompatible_qos=lambda event: self._note(item.complain, lambda: self._unserved(item, event))
        )
        create = self._node.create_subscription
        arguments = (item.kind, item.name, item.callback, profile)
        if declare:
            item.subscription = self._create(create, item.topic, *arguments, event_callbacks=events)
        else:  # the parameters hold the values of the first time, which are not to be applied again
            item.subscription = create(*arguments, event_callbacks=events)

    def _create(self, create: Any, topic: str, *arguments: Any, **options: Any) -> Any:
        try:
            return create(*arguments, qos_overriding_options=QoSOverridingOptions(POLICIES), **options)
        except (RuntimeError, ParameterException, InvalidQoSProfileException) as error:
            raise ConfigError(
                f"expected a usable QoS for {topic}, found: {error}; check the parameters qos_overrides.{topic}.*"
            ) from error

    def _overridden(self, topic: str, profile: QoSProfile) -> QoSProfile:
        """The profile with what the user has set. rclpy has no public way to see what that is."""
        for policy, values in (("reliability", ReliabilityPolicy), ("durability", DurabilityPolicy)):
            override = self._node._parameter_overrides.get(f"qos_overrides.{topic}.subscription.{policy}")
            if override is not None:
                setattr(profile, policy, values[override.value.upper()])
        return profile

    def _offers(self, item: Input) -> list[QoSProfile]:
        return [info.qos_profile for info in self._node.get_publishers_info_by_topic(item.name)]

    def _unserved(self, item: Input, event: Any) -> tuple[str | None, str]:
        """A publisher does not offer what is asked for: why that cannot be followed, and which nodes are meant."""
        policy = _policy(event)
        name = f"qos_overrides.{item.topic}.subscription.{policy}"
        infos = self._node.get_publishers_info_by_topic(item.name)
        refused = [info for info in infos if _conflict(info.qos_profile, item.profile)]
        if name not in self._node._parameter_overrides and policy in ("reliability", "durability"):
            return None, ""  # follow() asks for less
        names = _names(refused)
        text = (
            f"nothing arrives on {item.topic} from {names or 'a publisher'}: it offers "
            f"{_value(refused, policy)}, and {policy} {_word(getattr(item.profile, policy, '?'))} is asked for by the "
            f"parameter {name}: remove that, or let the publisher offer it"
        )
        return text, names

    def _refused(self, publisher: Any, name: str, event: Any) -> tuple[str | None, str]:
        """A subscriber asks for more than a publisher offers: what to do, and which nodes are meant."""
        policy, topic = _policy(event), publisher.topic_name
        infos = self._node.get_subscriptions_info_by_topic(name)
        refused = [info for info in infos if _conflict(publisher.qos_profile, info.qos_profile)]
        names = _names(refused)
        text = (
            f"nothing of {topic} reaches {names or 'a subscriber'}: it asks for {_value(refused, policy)}, and "
            f"{_word(getattr(publisher.qos_profile, policy, '?'))} is offered: change the subscriber, or set the "
            f"parameter qos_overrides.{topic}.publisher.{policy}"
        )
        return text, names


def _policy(event: Any) -> str:
    """The name of the policy that does not fit, as parameters have it."""
    return qos_policy_name_from_kind(event.last_policy_kind).lower()


def _conflict(offered: QoSProfile, asked: QoSProfile) -> bool:
    """By the two policies that endpoints choose. rclpy's own comparison takes the deadline of 0 of a profile of this
    node for one, and finds that nobody fits.
    """
    unreliable = asked.reliability == RELIABLE and offered.reliability == BEST_EFFORT
    return unreliable or (asked.durability == LATCHED and offered.durability == VOLATILE)


def _names(infos: list[Any]) -> str:
    """The nodes of these endpoints; empty where discovery does not know them yet."""
    known = [info for info in infos if info.node_name != UNNAMED]
    return ", ".join(sorted({f"{info.node_namespace.rstrip('/')}/{info.node_name}" for info in known}))


def _value(infos: list[Any], policy: str) -> str:
    values = {_word(getattr(info.qos_profile, policy, "?")) for info in infos}
    return f"{policy} {' or '.join(sorted(values))}" if values else f"another {policy}"


def _word(value: Any) -> str:
    return str(getattr(value, "name", value)).lower()
