"""On a rank: run an example's command, as ``python -m examples.NAME.run`` does."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    request = json.loads((Path(sys.argv[1]) / "request.json").read_text())
    importlib.import_module(f"examples.{request['example']}.run").main(request["argv"])
