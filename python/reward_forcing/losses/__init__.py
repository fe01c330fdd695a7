"""Losses of distillation, a file per family (docs/losses.md names the systems).

``OBJECTIVES`` is what ``distill.objective`` of a training file may name. A loss of your own is a class with
``generator_loss`` (``Objective``), put there under a name.
"""

from .common import Scorer, draw_timesteps, guided, surrogate, warp_timesteps
from .decoupled import DecoupledDMD, decoupled_dmd_loss
from .dmd import DMD, DMD2, TMD, AnyFlow, ReDMD, critic_flow_loss, dmd_loss, re_dmd_loss
from .objective import Batch, Objective
from .phased import PhasedDMD, phased_critic_loss, phased_dmd_loss, phased_noise
from .sid import SiD, SiDLSG, sid_gradients, sid_loss, sid_lsg_loss
from .tdm import TDM, mixed_noise, tdm_critic_loss, tdm_loss

OBJECTIVES: dict[str, type[Objective]] = {
    "dmd": DMD,
    "dmd2": DMD2,
    "re_dmd": ReDMD,
    "anyflow": AnyFlow,
    "tmd": TMD,
    "phased_dmd": PhasedDMD,
    "decoupled_dmd": DecoupledDMD,
    "tdm": TDM,
    "sid": SiD,
    "sid_lsg": SiDLSG,
}

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Objective",
    "Scorer",
    "critic_flow_loss",
    "decoupled_dmd_loss",
    "dmd_loss",
    "draw_timesteps",
    "guided",
    "mixed_noise",
    "phased_critic_loss",
    "phased_dmd_loss",
    "phased_noise",
    "re_dmd_loss",
    "sid_gradients",
    "sid_loss",
    "sid_lsg_loss",
    "surrogate",
    "tdm_critic_loss",
    "tdm_loss",
    "warp_timesteps",
]
