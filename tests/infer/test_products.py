"""Weights made ready for products: the product itself, on processors that oneDNN packs bf16 for and on others."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import torch
from shoestring.infer.products import Product, can_pack
torch.manual_seed(0)
x, weight, bias, add = (torch.randn(*shape).bfloat16() for shape in ((5, 48), (32, 48), (32,), (5, 32)))
for tile in (0, 4):
    for b in (None, bias):
        product = Product(weight, b, dtype=torch.bfloat16, tile=tile)
        for more in (None, add):
            exact = x.double() @ weight.double().T + (0 if b is None else b) + (0 if more is None else more)
            assert (product(x, more).double() - exact).abs().max() < 0.2
print(can_pack(torch.bfloat16, torch.device("cpu")))
"""


@pytest.mark.parametrize("most", ["DEFAULT", "AVX2"])
def test_products_in_bf16(most: str) -> None:
    """`AVX2`: what oneDNN does on processors without AVX-512."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": most}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() in ("True", "False")
    if most == "AVX2" and platform.machine() == "x86_64":
        assert done.stdout.strip() == "False"
