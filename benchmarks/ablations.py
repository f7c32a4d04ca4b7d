"""What each part of SCFeat is worth: short runs of `lite` that differ in one thing, measured on held-back data.

    python benchmarks/ablations.py --data DIR [--steps 700] [--only bridge] [--output runs/ablations]

DIR holds posed scenes with tracks (and any photographs). Runs that are done are not repeated, one that was interrupted
goes on. The scores are means over held-back warped photographs and over pairs of held-back scenes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from scfeat_core.data.photos import find_photos, load_photos, read_split
from scfeat_core.data.warps import WarpConfig
from scfeat_core.network.model import SCFeat
from scfeat_core.training.validation import WarpValidation

REPOSITORY = Path(__file__).resolve().parent.parent
BRIDGE = "model_config.backbone.cn_parts"
REWARD = "KeypointLoss_config.reward_config.reward_type"
# name: (configuration file, start from the run of that name or None, what is set)
RUNS: dict[str, tuple[str, str | None, dict[str, object]]] = {
    "base": ("pretrain_warps", None, {}),
    "bridge: none": ("pretrain_warps", None, {BRIDGE: "none"}),
    "bridge: position-wise norm only": ("pretrain_warps", None, {BRIDGE: "position"}),
    "bridge: channel-wise norm only": ("pretrain_warps", None, {BRIDGE: "channel"}),
    "peakiness off": ("pretrain_warps", None, {"model_config.detector.use_peakiness": False}),
    "alignment legacy": (
        "pretrain_warps",
        None,
        {"model_config.backbone.alignment": "legacy", "model_config.detector.alignment": "legacy"},
    ),
    "descriptors from desc_map": ("pretrain_warps", None, {"model_config.descriptor_source": "desc_map"}),
    "batch norm of the batch": ("pretrain_warps", None, {"bn_mode": "train"}),
    "reward posfeat": ("train_det", "base", {REWARD: "posfeat"}),
    "reward fmatrix_legacy": ("train_det", "base", {REWARD: "fmatrix_legacy"}),
    "reward fmatrix": ("train_det", "base", {REWARD: "fmatrix"}),
    "more warps": ("lite_posed", "base", {"data": "photos"}),
    "epipolar only": ("lite_posed", "base", {"track_weight": 0, "warp_share": 0}),
    "epipolar and warps": ("lite_posed", "base", {"track_weight": 0}),
    "tracks and warps": ("lite_posed", "base", {"EpipolarLoss_Line2Window_config.weight_window": 0}),
    "epipolar, tracks and warps": ("lite_posed", "base", {}),
}
# The published kind of detector, as only that has what some of the runs leave out.
DETECTOR = {"stride": 1, "use_peakiness": True, "peak_norm": "absmax"}
DETECTOR |= {"feature_channels": 8, "image_channels": 8, "merge_channels": 8}
PUBLISHED = {f"model_config.detector.{key}": value for key, value in DETECTOR.items()}
COMMON = {"device": "cpu", "epoch": 1, "data_config_train.batch_size": 4, "data_config_train.workers": 0}
COMMON |= {"save_freq": 100, "validate_freq": 1_000_000}
SMALL_VIEWS = {"data_config_train.warps.view_size": 128, "data_config_train.size": "[160,160]"}
SPLIT = REPOSITORY / "config/validation_split.yaml"
WARPED_PAIRS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700, help="of each run (%(default)s)")
    parser.add_argument("--only", default="", help="runs whose name contains this, and what they start from")
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args()
    chosen = [name for name in RUNS if args.only in name]
    started_from = {start for name in chosen if (start := RUNS[name][1]) is not None}
    for name in RUNS:
        if name in chosen or name in started_from:
            train(name, args)
    done = [name for name in RUNS if scores_of(name, args)]
    measure_warps(done, args)
    print(table(done, args))


def folder_of(name: str, args: argparse.Namespace) -> Path:
    return args.output / name.replace(": ", "_").replace(", ", "_").replace(" ", "_")


def train(name: str, args: argparse.Namespace) -> None:
    if scores_of(name, args):
        return
    config, start, settings = RUNS[name]
    folder = folder_of(name, args)
    settings = {**COMMON, **SMALL_VIEWS, "epoch_step": args.steps, **settings}
    settings = {**PUBLISHED, **settings} if start is None else {**settings, "load_path": folder_of(start, args)}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value, default=str)}")]
    words = [word.replace('"[', "[").replace(']"', "]") for word in words]
    resume = ["--resume"] if (folder / "last.pt").is_file() else []
    scfeat(
        "train",
        "--config",
        REPOSITORY / f"config/{config}.yaml",
        "--data",
        args.data,
        "--output",
        folder,
        *resume,
        *words,
    )
    weights = folder / "lite.safetensors"
    size_mode = ["--set", "size_mode=pad16"] if "legacy" in name and "alignment" in name else []
    common = ("--weights", weights, "--validation-split", SPLIT, "--limit", 20, *size_mode)
    scenes = args.data / "multiview" if (args.data / "multiview").is_dir() else args.data
    scfeat("evaluate", "pose", scenes, *common, "--runs", 3, "-o", folder)


def measure_warps(names: list[str], args: argparse.Namespace) -> None:
    """The same warped photographs for all, whatever they were trained on; kept in warps.json beside the weights."""
    missing = [name for name in names if not (folder_of(name, args) / "warps.json").is_file()]
    if not missing:
        return
    photos, _ = load_photos(find_photos(args.data, read_split(SPLIT), held_back=True), 640)
    validation = WarpValidation(photos, WARPED_PAIRS, WarpConfig())
    for name in missing:
        model = SCFeat.from_pretrained(folder_of(name, args) / "lite.safetensors")
        (folder_of(name, args) / "warps.json").write_text(json.dumps(validation.measure(model, "cpu")))


def scfeat(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "scfeat_core.cli", *map(str, words)], check=True, cwd=Path.cwd())


def scores_of(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Empty where the run is not done."""
    folder = folder_of(name, args)
    if not (folder / "results.json").is_file():
        return {}
    pose = json.loads((folder / "results.json").read_text())["sections"]["pose"]["all"]
    warps = folder / "warps.json"
    return {**pose, **(json.loads(warps.read_text()) if warps.is_file() else {})}


def table(names: list[str], args: argparse.Namespace) -> str:
    head = "| run | warps: MMA@3 | repeatability@3 | matches | scenes: matches | epipolar@3 | pose AUC@5/10/20 |"
    rows = [head, "|---|--:|--:|--:|--:|--:|---|"]
    for name in names:
        scores = scores_of(name, args)
        warps = [100 * scores[f"validation_{key}"] for key in ("mma3", "repeatability3")]
        numbers = [*warps, scores["validation_matches"], scores["matches"], scores["epipolar@3"]]
        pose = " / ".join(f"{scores[f'AUC@{t}']:.1f}" for t in (5, 10, 20))
        rows.append(f"| {name} | {' | '.join(f'{number:.1f}' for number in numbers)} | {pose} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
