"""Losses of distillation, a file per family (docs/losses.md names the systems).

``OBJECTIVES`` is what ``distill.objective`` of a training file may name. A loss of your own is a class with
``generator_loss`` (``Objective``), put there under a name.
"""

from .common import Scorer, draw_timesteps, guided, surrogate, warp_timesteps
from .decoupled import DecoupledDMD, decoupled_dmd_loss
from .dmd import DMD, DMD2, TMD, AnyFlow, ReDMD, critic_flow_loss, dmd_loss, re_dmd_loss
from .f_distill import DIVERGENCES, Discriminator, FDistill, discriminator_loss, f_distill_loss, f_weight
from .flow import AWM, DiffusionOPD, awm_loss, diffusion_opd_loss
from .objective import Batch, Objective
from .partition import MultiStudent, partition_of
from .phased import PhasedDMD, phased_critic_loss, phased_dmd_loss, phased_noise
from .sid import SiD, SiDLSG, sid_gradients, sid_loss, sid_lsg_loss
from .stream_r1 import BalancedReward, StreamR1, mixed_saliency, saliency_weight
from .tdm import TDM, mixed_noise, tdm_critic_loss, tdm_loss
from .temporal import Diagonal, diagonal_loss, difference_weight
from .weights import AdaState, HalloLive, frame_ramp, product_weight, standardized
from .window import SelfForcingPP, window

OBJECTIVES: dict[str, type[Objective]] = {
    "dmd": DMD,
    "dmd2": DMD2,
    "re_dmd": ReDMD,
    "anyflow": AnyFlow,
    "tmd": TMD,
    "phased_dmd": PhasedDMD,
    "decoupled_dmd": DecoupledDMD,
    "tdm": TDM,
    "f_distill": FDistill,
    "sid": SiD,
    "sid_lsg": SiDLSG,
    "multi_student": MultiStudent,
    "stream_r1": StreamR1,
    "adastate": AdaState,
    "hallo_live": HalloLive,
    "self_forcing_pp": SelfForcingPP,
    "diagonal": Diagonal,
    "awm": AWM,
    "diffusion_opd": DiffusionOPD,
}

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "BalancedReward",
    "Batch",
    "Discriminator",
    "Objective",
    "Scorer",
    "awm_loss",
    "critic_flow_loss",
    "decoupled_dmd_loss",
    "diagonal_loss",
    "difference_weight",
    "diffusion_opd_loss",
    "discriminator_loss",
    "dmd_loss",
    "draw_timesteps",
    "f_distill_loss",
    "f_weight",
    "frame_ramp",
    "guided",
    "mixed_noise",
    "mixed_saliency",
    "partition_of",
    "phased_critic_loss",
    "phased_dmd_loss",
    "phased_noise",
    "product_weight",
    "re_dmd_loss",
    "saliency_weight",
    "sid_gradients",
    "sid_loss",
    "sid_lsg_loss",
    "standardized",
    "surrogate",
    "tdm_critic_loss",
    "tdm_loss",
    "warp_timesteps",
    "window",
]
