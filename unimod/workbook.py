"""The runner: checks what was asked before any kernel starts, runs notebooks, and leaves a folder per run and a report.

    python -m unimod list
    python -m unimod check all -f params/smoke.yaml
    python -m unimod run 03 -p data=digits -p samples=8
    python -m unimod run all -f params/default.yaml

Parameters: the notebook's own values < files < -p, all coerced and checked by `unimod.config.Params`. A run goes to
<runs>/<notebook>/<key>/, where the key is a hash of the notebook, its parameters, this package and its input files: what is done is
not done again. Exit codes: 0 ok, 2 parameters, 3 environment, 4 a notebook's error, 124 timeout, 130 interrupted, 138 kernel died.
papermill and the kernel's packages are imported only when a notebook is about to run, so `check` takes a fraction of a second.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from . import report
from .config import ParameterError, Params
from .execute import Stop, execute
from .plan import MAKERS, CapacityPlan
from .run import RUNNERS, RunError, home, latest, runs_folder, write
