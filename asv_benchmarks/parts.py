"""Parts of a script, each in a process of its own, whose findings are written before the next one begins."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Part", "device", "main", "said"]

ROOT = Path(__file__).resolve().parents[1]
Part = Callable[[], Mapping[str, Any]]
"""What a part is: it returns what it has found, and under "wrong" what is not as it has to be."""

MISSING = """{name} is missing here. Without an index, carry a wheel: where there is one,

    pip download --no-deps array-api-compat -d wheels

and on this machine

    PYTHONPATH=$(ls wheels/array_api_compat-*.whl) python {script}"""


def device() -> str:
    """Where parts run: CUDA, or the CPU under Triton's interpreter, where that was asked for."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def said(text: str) -> None:
    """Tell the user at once."""
    print(text, file=sys.stderr, flush=True)


def main(
    script: str,
    parts: Mapping[str, Part],
    about: str,
    seconds: int,
    finish: Callable[[Path, Mapping[str, Any]], None] | None = None,
) -> None:
    """Run the parts that are asked for; end with 1 if one has failed, or has found something wrong.

    Args:
        script: the file whose parts these are.
        parts: the parts by name, in their order.
        about: what `--help` says.
        seconds: how long a part may take.
        finish: what is made at the end of all that is found in the folder, by part.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("part", nargs="*", choices=[*parts, []], help="these alone")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of what is written")
    parser.add_argument("--alone", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "backends"), str(ROOT / "asv_benchmarks")]
    try:
        import torch

        import recadam_core  # noqa: F401
    except ImportError as error:
        sys.exit(MISSING.format(name=error.name, script=Path(script).relative_to(ROOT)))
    if options.alone:
        options.alone.write_text(json.dumps(parts[options.part[0]]()), encoding="utf-8")
        return
    if device() == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured, nothing is claimed")
        return
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.part or parts if not _ran(script, name, out, seconds)]
    if finish is not None:
        files = {name: _file(script, name, out) for name in parts}
        finish(
            out, {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.exists()}
        )
    print(f"wrong or failed: {', '.join(failed)}" if failed else "all of it is as it has to be")
    sys.exit(bool(failed))


def _file(script: str, name: str, out: Path) -> Path:
    return out / f"{Path(script).stem}-{name.replace(' ', '-')}.json"


def _ran(script: str, name: str, out: Path, seconds: int) -> bool:
    """Whether a part came to its end, and found nothing wrong."""
    file = _file(script, name, out)
    file.unlink(missing_ok=True)
    command = [sys.executable, str(Path(script).resolve()), name, "--alone", str(file)]
    began = time.perf_counter()
    try:
        code = subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        code = 124
    took = time.perf_counter() - began
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    wrong = found.get("wrong", [])
    if code:
        wrong = [*wrong, f"ended with {code}"]
    print(f"{name}: {'WRONG' if wrong else 'right'}, {took:.0f} s", flush=True)
    for line in wrong[:20]:
        print(f"  {line}", flush=True)
    return not wrong
