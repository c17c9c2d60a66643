"""Megatron's distributed optimizer over torch's Adam, which it uses where neither Apex nor Transformer Engine is.

Upstream's checkpoint code assumes their fused Adam, which keeps one step count for a group of parameters; torch's keeps
one for each parameter, as part of its state.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer

_Optimizer = distrib_optimizer.DistributedOptimizer
_UPSTREAM_SHARDED_STATE_DICT = _Optimizer.sharded_state_dict
_UPSTREAM_LOAD_STATE_DICT = _Optimizer.load_state_dict
_UPSTREAM_SET_STATES = _Optimizer._set_main_param_and_optimizer_states


def sharded_state_dict(
    self: _Optimizer,
    model_sharded_state_dict: Any = {},  # noqa: B006 - upstream's signature
    is_loading: bool = False,
    sharding_type: str | None = None,
    metadata: dict | None = None,
) -> Any:
    """Stands for ``DistributedOptimizer.sharded_state_dict``: gives an optimizer that loads a state to load into.

    Upstream reads the step count out of the state first, and a fresh optimizer has none.  What the dummy step does to
    the parameters is overwritten by the checkpoint that is being loaded.
    """
    if is_loading and not distrib_optimizer.HAVE_APEX_OR_TE and not self.optimizer.state:
        self._init_optimizer_states_with_dummy_values()
    return _UPSTREAM_SHARDED_STATE_DICT(self, model_sharded_state_dict, is_loading, sharding_type, metadata)


def load_state_dict(self: _Optimizer, state_dict: dict[str, Any]) -> None:
    """Stands for ``DistributedOptimizer.load_state_dict``: one step count for each parameter, not one for all.

    Upstream puts one tensor into every parameter's state; torch's Adam adds 1 to it for each parameter in turn.
    ``no_grad`` because upstream copies into fp32 parameters in place.
    """
    with torch.no_grad():
        _UPSTREAM_LOAD_STATE_DICT(self, state_dict)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def set_main_param_and_optimizer_states(self: _Optimizer, model_param: torch.nn.Parameter, tensors: dict) -> None:
    """Stands for ``DistributedOptimizer._set_main_param_and_optimizer_states``: a checkpoint may lack the step count.

    The fully reshardable format keeps it with the parameter groups alone; :func:`load_state_dict` has set it by then.
    """
    _UPSTREAM_SET_STATES(self, model_param, {"step": None, **tensors})
