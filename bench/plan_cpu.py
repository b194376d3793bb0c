"""Predicted against measured step time of our own training on this CPU, on shapes the planner was not calibrated on.

    python bench/plan_cpu.py [--repeats N] [--threads N] [--small]

Calibration measures the parts of a step and the real steps of ten models (`cli_measure.STEPS`); the twenty models held out
here are timed in the same rounds and enter no fit. A step is training's own (train/step.py): forward, loss, backward,
clipping, AdamW, router balance. Times are the least of all rounds. There is no peer that predicts steps on a CPU; the
plain method beside ours is FLOPs over the best measured product rate, times the mean ratio on the calibration steps.
"""

# ruff: noqa: E501 (a table of sizes)
from __future__ import annotations

import argparse
import json
import time
from statistics import mean, median
from typing import Any

import torch

from shoestring.cli_measure import STEPS, measured_with

# sizes as in cli_measure.STEPS, none of them used there. The first six are the oldest: the others were added to see that
# the six had not been fitted by eye.
HELD = (
    ("dense", 160, 3, 5, 448, 0, 512, 16, 128), ("dense", 256, 6, 8, 768, 0, 512, 8, 128), ("dense", 320, 4, 10, 896, 0, 1024, 4, 256),
    ("moe", 160, 4, 5, 384, 8, 512, 16, 128), ("moe", 192, 3, 6, 512, 16, 1024, 8, 128), ("moe", 256, 6, 8, 768, 16, 4096, 4, 256),
    ("dense", 512, 2, 8, 1536, 0, 1024, 4, 256), ("dense", 64, 8, 2, 192, 0, 256, 32, 128), ("dense", 192, 2, 6, 640, 0, 32768, 2, 256),
    ("dense", 128, 4, 4, 512, 0, 512, 2, 1024), ("dense", 256, 3, 4, 640, 0, 2048, 64, 32),
    ("moe", 128, 2, 4, 512, 32, 1024, 4, 512), ("moe", 384, 3, 6, 1024, 8, 512, 8, 128), ("moe", 192, 2, 6, 384, 16, 16384, 4, 256),
    ("moe", 96, 6, 3, 256, 16, 256, 16, 64),
    # tiny ones, where a step is mostly calls
    ("dense", 48, 4, 2, 128, 0, 256, 16, 64), ("dense", 96, 8, 3, 256, 0, 256, 4, 64), ("moe", 64, 4, 2, 256, 8, 256, 8, 64),
    ("moe", 128, 8, 4, 256, 8, 512, 4, 64), ("moe", 64, 6, 2, 192, 16, 256, 32, 64),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default="all", help="accepted for uniformity; there is none")
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="three models held out")
    options = parser.parse_args()
    held = HELD[::5] if options.small else HELD
    torch.set_num_threads(options.threads)
    calibration, steps = measured_with(STEPS + held, options.repeats, len(STEPS))
    plain = mean(t * calibration.peak / flops(s, b, n) for s, b, n, t in steps[: len(STEPS)])
    print(calibration.text())
    errors, flat = [], []
    for case, (shape, sequences, length, taken) in zip(held, steps[len(STEPS) :], strict=True):
        predicted = calibration.step_seconds(shape, sequences, length)
        errors.append(predicted / taken - 1)
        flat.append(plain * flops(shape, sequences, length) / calibration.peak / taken - 1)
        kind, width, layers, _, _, experts, vocab = case[:7]
        name = f"{kind} d{width} L{layers} V{vocab}" + (f" E{experts}" if experts else "")
        print(f"{name:<24} {sequences:>2}x{length:<4}: measured {taken * 1e3:7.1f} ms, predicted {predicted * 1e3:7.1f} ms "
              f"({errors[-1]:+.1%}); FLOPs alone {flat[-1]:+.1%}")  # fmt: skip
    report(errors, flat, calibration)


def flops(shape: Any, sequences: int, length: int) -> float:
    return float(shape.flops_per_token(length) * sequences * length)


def report(errors: list[float], flat: list[float], calibration: Any) -> None:
    """Medians, the worst, and the JSON line."""
    ours, other = (median(map(abs, es)) for es in (errors, flat))
    worst = max(map(abs, errors))
    inside = sum(abs(e) <= 0.10 for e in errors)
    print(f"{inside} of {len(errors)} within 10%; median error {ours:.1%}, worst {worst:.1%}; FLOPs alone {other:.1%}")
    print(json.dumps([{
        "name": "plan_cpu", "metric": "median relative error of predicted step time", "unit": "share", "ours": ours,
        "peers": {"flops_alone": other}, "best_peer": "flops_alone", "ratio": other / max(ours, 1e-9), "limit": None,
        "share_of_limit": None, "machine": calibration.host, "versions": {"torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"), "worst": worst, "within_10": inside, "held": len(errors),
        "kernels": calibration.kernels, "threads": calibration.threads,
    }]))  # fmt: skip


if __name__ == "__main__":
    main()
