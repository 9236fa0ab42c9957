"""Tiny notebooks made on the fly in a working folder of their own, and the command line called on them."""

import json

import nbformat
import pytest

from unimod.__main__ import main

SETUP = """from unimod.params import Params
from unimod.workbook.run_folder import Run
params = Params.declared(globals())
run = Run.open({name!r}, params)"""
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """A working folder with `notebooks/`; see `Bench`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    return Bench(tmp_path, capsys)


class Bench:
    """Makes notebooks and calls the command line; `out` and `err` hold what the last call printed."""

    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys

    def notebook(self, name, *cells, parameters="seed = 0  # seed\nsteps = 60", setup=True, finish=True,
                 title="What is it?"):
        """Write notebooks/<name>.ipynb: title, parameters, setup, the given cells, run.finish()."""
        runner = "\ninteractive = True\nrun_dir = ''"
        code = [SETUP.format(name=name)] * setup + list(cells) + ["run.finish()"] * finish
        nb = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL, "unimod": {"minutes": 0.1}}, cells=[
            nbformat.v4.new_markdown_cell(f"# {title}\n\nSome *prose*."),
            nbformat.v4.new_code_cell(parameters + runner, metadata={"tags": ["parameters"]}),
            *map(nbformat.v4.new_code_cell, code)])
        path = self.root / "notebooks" / f"{name}.ipynb"
        nbformat.write(nb, path)
        return path

    def call(self, *args):
        """Exit code of `python -m unimod <args>`."""
        self.capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse
            code = stop.code
        self.out, self.err = self.capsys.readouterr()
        return code

    def folders(self, name):
        """All run folders of a notebook."""
        return sorted((self.root / "runs" / name).glob("*"))

    def folder(self, name):
        """Its only run folder."""
        (folder,) = self.folders(name)
        return folder

    def record(self, name):
        """Its run.json."""
        return json.loads((self.folder(name) / "run.json").read_text())
