"""The bidirectional Wan transformer: the teacher, and the critic, of distribution matching distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .blocks import BidirectionalSelfAttention, TextKeys, WanTransformer


class BidirectionalWanModel(WanTransformer):
    """Flow predictor of a whole clip, differentiable. Parameters are those of ``CausalWanModel``, name for
    name."""

    self_attention = BidirectionalSelfAttention

    def forward(
        self, x: Tensor, t: Tensor, text: list[TextKeys] | Tensor, *, seq_len: int | None = None
    ) -> Tensor:
        """Flow ``noise - x0`` of a clip.

        Args:
            x: noisy latent ``[B, in_dim, F, H, W]``.
            t: one timestep per sample ``[B]``.
            text: from ``text_keys``; or text features ``[B, n, text_dim]``, whose keys it then makes:
                in training their parameters get gradient, and shards are gathered block by block.
            seq_len: pad the token sequence with zeros to this length (one shape for clips of several sizes).
                Padding is masked as keys and dropped at the end: the result does not depend on it.
        Returns:
            ``[B, out_dim, F, H, W]``.
        """
        grid = self._check_latent(x)
        self._expect(tuple(t.shape) == (x.shape[0],), "t", f"[{x.shape[0]}]", tuple(t.shape))
        hidden = self._patchify(x)
        tokens = hidden.shape[1]
        if seq_len is not None:
            self._expect(seq_len >= tokens, "seq_len", f"at least the clip's {tokens} tokens", seq_len)
            hidden = F.pad(hidden, (0, 0, 0, seq_len - tokens))
        rope = self.config.rope
        angles, axes = rope.table([range(length) for length in grid], dtype=x.dtype, device=x.device)
        attention = (tokens, angles, axes, rope.layout)
        y = self._run(hidden, t.unsqueeze(1), text, lambda layer: attention)
        return self._unpatchify(y[:, :tokens], grid).to(x.dtype)
