"""What `engine.compiled.build` runs in a process of its own: mypyc and the C compiler, for one folder (argument 1).

The folder appears whole or not at all: it is built beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from engine import compiled


def main(where: Path) -> None:
    """Raises SystemExit with the compiler's words."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent) as work:
        sources = [str(compiled.source(room).relative_to(Path.cwd())) for room in compiled.ROOMS]
        extensions = mypycify(
            ["--config-file=", f"--cache-dir={work}/mypy", *sources],
            opt_level="2",
            debug_level="0",
            multi_file=True,
            group_name=compiled.GROUP,
            target_dir=f"{work}/c",
        )
        command = Distribution({"name": "sales-push-rooms", "ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib, command.build_temp, command.parallel = f"{work}/lib", f"{work}/objects", os.cpu_count()
        command.ensure_finalized()
        command.run()
        made = Path(work) / "made"
        made.mkdir()
        for path in Path(work, "lib").rglob("*.so"):  # engine/smtp/lines.<tag>.so becomes engine.smtp.lines.<tag>.so
            shutil.copy(path, made / ".".join(path.relative_to(f"{work}/lib").parts))
        shutil.rmtree(where, ignore_errors=True)
        made.rename(where)
    for other in where.parent.iterdir():  # of sources that are no more
        if other != where and len(other.name) == len(where.name):
            shutil.rmtree(other, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
