"""Tiny notebooks made on the fly in a working folder of their own, and a way to call the command line on them."""

import nbformat
import pytest

from unimod.__main__ main import main
