"""Predictions are scored without the library that made them, and with its numbers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from ultralytics.utils.metrics import compute_ap

from visionpeft.families.predictions import _area


def test_the_area_under_a_curve_is_ultralytics_bit_for_bit() -> None:
    numbers = np.random.default_rng(0)
    for count in numbers.integers(1, 40, 200):
        recall, precision = np.sort(numbers.random(count)), numbers.random(count)
        assert _area(recall, precision) == compute_ap(recall, precision)[0]


def test_results_are_compared_without_the_libraries() -> None:
    code = (
        "import sys, visionpeft.benchmark.comparison, visionpeft.report; print({'ultralytics', 'timm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
