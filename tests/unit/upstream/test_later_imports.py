"""Packages that are imported when they are used, in a process of its own for what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.launch import ROOT

#: A package as upstream's tokenizers have one, and a user of it that is imported while it is put off.
PACKAGE = {
    "heavy/__init__.py": "__version__ = '7'\nprint('imported', flush=True)\n\n\nclass Model:\n    made = 'of heavy'\n",
    "heavy/parts/__init__.py": "",
    "heavy/parts/doing.py": "def twice(number):\n    return 2 * number\n",
    "user.py": "import heavy\nfrom heavy import Model\nfrom heavy.parts.doing import twice\n",
}

#: What is there after each line that has a comment is printed.
PROGRAM = """
import importlib.util, inspect, sys
from sla_megatron.upstream.later_imports import imported_later
with imported_later("heavy", "not_installed"):
    import user
    try:
        import not_installed
    except ModuleNotFoundError as error:
        print(error)
    print("heavy there:", importlib.util.find_spec("heavy") is not None)
print("put off:", "heavy" not in sys.modules and "heavy.parts.doing" not in sys.modules)
inspect.getmodule(inspect.currentframe())
print("looked over")
print(user.twice(21), user.Model.made)
import heavy
print(user.heavy == heavy, heavy == user.heavy, user.heavy == sys, user.heavy.__version__)
print(isinstance(heavy.Model(), user.Model), isinstance(heavy, user.Model), user.Model | None)
class Other(user.Model): pass
print(Other.__mro__[1] is heavy.Model, user.Model().made)
with imported_later("heavy"):
    import user, heavy as again
    print(again is heavy)
"""


def test_a_package_is_imported_at_its_first_use(tmp_path: Path) -> None:
    """Names, submodules, subclasses and comparisons are then the package's own; what is not installed is not there."""
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n{PROGRAM}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "No module named 'not_installed'",
        "heavy there: True",
        "put off: True",
        "looked over",
        "imported",
        "42 of heavy",
        "True True False 7",
        "True False heavy.Model | None",
        "True of heavy",
        "True",
    ]
