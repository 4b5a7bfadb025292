"""[93] How new data permeates LLM knowledge and how to dilute it.

The paper teaches a language model one surprising text at a time and finds that its keyword becomes likelier in contexts
that it has nothing to do with, the more so the less likely it was before; and that leaving out the largest updates, or
telling the fact by way of likelier words, leaks less.

Tested on a small model of short texts of eight themes, in which every attribute's probability is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from actome.dynamics.priming_scores import Sample, priming, priming_threshold, stepping_stone
from actome.papers.registry import Entry, Scale
from actome.tasks import Subject, SubjectConfig, train
from actome.tasks.theme_world import LINK, ThemeWorld
from actome.tasks.trials import spearman, trial_seeds
from actome.tune import IgnoreTopK

STEPS, EVERY, ROWS, RATE = 30, 1, 16, 3e-4
