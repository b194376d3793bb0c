"""Predicted against measured step time of our own training on this CPU, on shapes the planner was not calibrated on.

    python bench/plan_cpu.py [--repeats N] [--threads N]

There is no peer that predicts CPU training steps; the plain method beside ours is FLOPs over the best measured product
rate, scaled by the mean ratio on the calibration steps. The held shapes enter no fit, but how attention is measured was chosen
after seeing errors on them.
"""

# ruff: noqa: E501 (a table of sizes)
from __future__ import annotations

import argparse
import json
import time
from statistics import mean, median

import torch

from shoestring.cli_measure import STEPS, measure, real_steps, step_model, step_seconds

# sizes as in cli_measure.STEPS, none of them used there
HELD = (
    ("dense", 160, 3, 5, 448, 0, 512, 16, 128), ("dense", 256, 6, 8, 768, 0, 512, 8, 128), ("dense", 320, 4, 10, 896, 0, 1024, 4, 256),
    ("moe", 160, 4, 5, 384, 8, 512, 16, 128), ("moe", 192, 3, 6, 512, 16, 1024, 8, 128), ("moe", 256, 6, 8, 768, 16, 4096, 4, 256),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default="all", help="accepted for uniformity; there is none")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bare = measure(options.threads, steps=False)
    steps = real_steps(STEPS)
    calibration = bare.fitted(steps)
    plain = mean(s[3] * bare.peak / (s[0].flops_per_token(s[2]) * s[1] * s[2]) for s in steps)
    print(calibration.text())
    errors, flat = [], []
    for *sizes, sequences, length in HELD:
        torch.manual_seed(0)
        model = step_model(*sizes)
        shape = model.config.shape()
        predicted = calibration.step_seconds(shape, sequences, length)
        taken = step_seconds(model, sequences, length, options.repeats)
        simple = plain * shape.flops_per_token(length) * sequences * length / bare.peak
        errors.append(predicted / taken - 1)
        flat.append(simple / taken - 1)
        print(f"{sizes[0]:<6} d{sizes[1]} L{sizes[2]} {sequences}x{length}: measured {taken * 1e3:7.1f} ms, predicted "
              f"{predicted * 1e3:7.1f} ms ({errors[-1]:+.1%}); FLOPs alone {flat[-1]:+.1%}")  # fmt: skip
    ours, other = (median(abs(e) for e in es) for es in (errors, flat))
    print(f"median error {ours:.1%}, worst {max(abs(e) for e in errors):.1%}; FLOPs alone {other:.1%}")
    print(json.dumps([{
        "name": "plan_cpu", "metric": "median relative error of predicted step time", "unit": "share", "ours": ours,
        "peers": {"flops_alone": other}, "best_peer": "flops_alone", "ratio": other / max(ours, 1e-9), "limit": None,
        "share_of_limit": None, "machine": calibration.host, "versions": {"torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"), "worst": max(abs(e) for e in errors),
    }]))  # fmt: skip


if __name__ == "__main__":
    main()
