"""Plug-in of daydreamlive/scope, entry point of the group ``scope``: its pipelines on this library.

Scope imports this module when it starts, and calls ``register_pipelines`` when its own pipelines are
registered. With ``RF_SCOPE=1`` in the environment, the generator of each pipeline of ``PIPELINES`` is patched
(``integrations.wan``) once the pipeline has been built: adapters and quantised linears are in it by then.
Without, nothing happens.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable

from pluggy import HookimplMarker

from . import wan

_LOGGER = logging.getLogger(__name__)
#: Package in ``scope.core.pipelines`` -> (class of its pipeline, family of its attention modules).
PIPELINES = {
    "reward_forcing": ("RewardForcingPipeline", "reward_forcing"),
    "longlive": ("LongLivePipeline", "longlive"),
    "streamdiffusionv2": ("StreamDiffusionV2Pipeline", "scope_streamdiffusionv2"),
}


@HookimplMarker("scope")
def register_pipelines(register: Callable) -> None:
    """Scope's hook. No pipeline is added: those that Scope has get patched generators."""
    if os.environ.get("RF_SCOPE") != "1":
        return
    for package, (name, family) in PIPELINES.items():
        try:
            cls = getattr(importlib.import_module(f"scope.core.pipelines.{package}.pipeline"), name)
        except ImportError as error:  # Scope itself goes on without a pipeline that it cannot import
            _LOGGER.warning("%s is not patched: %s", name, error)
            continue
        if not hasattr(cls.__init__, "__wrapped__"):  # the hook is called again when plug-ins change
            cls.__init__ = _patched(cls.__init__, family)


def _patched(build: Callable, family: str) -> Callable:
    @functools.wraps(build)
    def init(self, *args, **kwargs):
        build(self, *args, **kwargs)
        wan.patch(self.components.generator, family=family)

    return init
