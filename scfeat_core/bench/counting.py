"""Operations, bytes and memory of the network by weights and size, counted without running it: for any machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from scfeat_core.bench.floors import NetworkCost, Work, network_cost
from scfeat_core.bench.settings import Case, Settings, Variant
from scfeat_core.network.inference import inference_network
from scfeat_core.network.model import VARIANTS, SCFeat
from scfeat_core.network.weights import shipped_weights


def network_weights(name: str) -> str | SCFeat:
    """Shipped weights, a path, ``random`` (lite), or a variant of the network with random weights: the same time, and
    features that mean nothing."""
    if name != "random" and is_random(name):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return SCFeat.create(name)
    return name


def is_random(name: str) -> bool:
    """Whether the features mean nothing, so that what comes after them takes another time than it would."""
    return name == "random" or (name in VARIANTS and name not in shipped_weights())


def load_network(name: str) -> SCFeat:
    """On the CPU. Raises WeightsError."""
    found = network_weights("lite" if name == "random" else name)
    return found if isinstance(found, SCFeat) else SCFeat.from_pretrained(found)


def cost_of(variant: Variant, case: Case) -> NetworkCost:
    """Of the network as inference runs it, on the whole batch. Raises WeightsError."""
    return counted_cost(variant.weights, (case.batch, 3, case.size[1], case.size[0]), variant.precision)


@lru_cache(maxsize=64)
def counted_cost(weights: str, shape: tuple[int, ...], precision: str) -> NetworkCost:
    """The same for images of a shape (B, 3, H, W). Some rewritings buy fewer bytes with more operations, or the other
    way round, and a floor is what no way of computing it can do without: so the fewer of each count."""
    precision = "float32" if precision == "auto" else precision
    run, defined = (network_cost(network, shape, precision) for network in imagined_networks(weights))
    fewest = Work(min(run.work.flops, defined.work.flops), min(run.work.bytes, defined.work.bytes))
    return NetworkCost(fewest, run.peak_bytes)


@lru_cache(maxsize=4)
def imagined_networks(weights: str) -> tuple[nn.Module, nn.Module]:
    """As inference runs it, and as it is defined; without content."""
    model = load_network(weights)
    return inference_network(model).to("meta"), model.to("meta")


# -- a table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """Of one pass over a batch."""

    variant: Variant
    case: Case
    parameters: int
    cost: NetworkCost


def count(settings: Settings) -> list[Count]:
    """For all weights, sizes, batches and precisions; budgets, devices and engines make no difference. Raises
    WeightsError."""
    keys = dict.fromkeys(
        (variant.weights, variant.precision, case.size, case.batch)
        for variant in settings.variants
        for case in settings.cases
    )
    return [
        _count(Variant(weights, precision=precision), Case(size, batch=batch))
        for weights, precision, size, batch in keys
    ]


def _count(variant: Variant, case: Case) -> Count:
    parameters = sum(each.numel() for each in imagined_networks(variant.weights)[1].parameters())
    return Count(variant, case, parameters, cost_of(variant, case))


def rows(counts: list[Count]) -> list[list[str]]:
    """A head, and one row each."""
    head = ["weights", "precision", "images", "M parameters", "GFLOP", "MB moved", "FLOP/byte", "MB held"]
    return [head, *(_row(each) for each in counts)]


def _row(found: Count) -> list[str]:
    work = found.cost.work
    return [
        found.variant.weights,
        found.variant.precision,
        f"{found.case.batch} x {found.case.size_text}",
        f"{1e-6 * found.parameters:.2f}",
        _giga(work.flops),
        f"{1e-6 * work.bytes:.0f}",
        f"{work.flops / work.bytes:.0f}",
        f"{1e-6 * found.cost.peak_bytes:.0f}",
    ]


def _giga(value: float) -> str:
    return f"{1e-9 * value:.0f}" if value >= 1e11 else f"{1e-9 * value:.1f}"
