"""Three-axis rotary embedding of the published path (golden kind ``rope``, tests/golden/README.md section 2).

A head of ``D`` components has ``D/2`` pairs of adjacent components ``(2j, 2j+1)``, read as complex numbers.
The first ``D/2 - 2*(D/2 // 3)`` of them turn with the frame, the next ``D/2 // 3`` with the row, the last
``D/2 // 3`` with the column. Pair ``j`` of a group of ``n`` pairs turns by ``position * 10000^(-j/n)``.
"""

from __future__ import annotations

import torch

#: Rows of the published table; the frame position, and therefore the length of the key sequence, is limited
#: to it.
TABLE_ROWS = 1024


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Rotated pairs of a head by axis: (time, height, width). 128 -> (22, 21, 21)."""
    half = head_dim // 2
    spatial = half // 3
    return half - 2 * spatial, spatial, spatial


def rope_table(
    head_dim: int, rows: int = TABLE_ROWS, theta: float = 10000.0, device: torch.device | None = None
) -> torch.Tensor:
    """Unit complex numbers ``exp(i * row * theta^(-j/n))``: complex128 ``[rows, head_dim/2]``, columns time |
    height | width."""
    position = torch.arange(rows, dtype=torch.float64, device=device)
    angles = []
    for pairs in axis_pairs(head_dim):
        exponent = torch.arange(0, 2 * pairs, 2, dtype=torch.float64, device=device) / (2 * pairs)
        angles.append(torch.outer(position, 1.0 / torch.pow(theta, exponent)))
    angle = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angle), angle)


def rope_apply(
    x: torch.Tensor, grid: tuple[int, int, int], table: torch.Tensor, start_frame: int = 0
) -> torch.Tensor:
    """Rotate the first ``f*h*w`` tokens of ``x``, in complex128, and round back to the dtype of ``x``.

    Args:
        x: ``[B, S, H, D]``, tokens frame-major, then row, then column. Tokens from ``f*h*w`` on pass through
            unchanged.
        grid: ``(f, h, w)``, frames, rows and columns of the rotated tokens.
        table: ``rope_table(D)``.
        start_frame: frame position of the first frame.

    Published quirk: the temporal rows are the slice ``table[start_frame : start_frame + f]``. A negative
    ``start_frame`` therefore wraps to ``rows + start_frame``, and a slice that reaches row 0 from below is
    empty and raises RuntimeError.
    """
    frames, height, width = grid
    tokens = frames * height * width
    time, row, column = table.split(axis_pairs(x.shape[-1]), dim=1)
    shape = (frames, height, width, -1)
    turn = torch.cat(
        [
            time[start_frame : start_frame + frames].reshape(frames, 1, 1, -1).expand(shape),
            row[:height].reshape(1, height, 1, -1).expand(shape),
            column[:width].reshape(1, 1, width, -1).expand(shape),
        ],
        dim=-1,
    ).reshape(tokens, 1, -1)
    pairs = torch.view_as_complex(x[:, :tokens].to(torch.float64).unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * turn).flatten(-2)
    return torch.cat([rotated, x[:, tokens:]], dim=1).to(x.dtype)
