"""Upstream's configuration of a model, made of parsed arguments, as one of our class.

Megatron 0.19 and 0.20 are told the class (upstream's #4520).  dev, which lacks that change, makes its own.
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any


def config_of_class(make: Callable[..., Any], cls: type, args: Namespace, **kwargs: Any) -> Any:
    """``make(args, **kwargs)``, upstream's function, as a ``cls``.

    ``cls`` extends the class that upstream makes, by fields with plain defaults.
    """
    if "model_config_cls" in inspect.signature(make).parameters:
        return make(args, model_config_cls=cls, **kwargs)
    config = make(args, **kwargs)
    # Not made anew of its fields: what sets one of these may set one of the transformer inside instead.
    object.__setattr__(config, "__class__", cls)
    return config
