"""Small orthogonalisations that never wait for the device.

The library's own factorisations of symmetric matrices check their result on the host, which
stalls a GPU. These are fixed sequences of plain tensor operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Where eigenvalues repeat, or range over many orders, cyclic Jacobi converges linearly, the slower
# the larger the matrix. One more sweep for every three rows leaves 1e-12 of all that was tried, up
# to n = 128.
SWEEPS = 6
DEAD = 1e-4  # a float32 row of which less is left after projection is round-off
TINY = 1e-300  # float64: keeps 0 / 0 at 0


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Return the rows (R, P) orthonormalised in order; a dependent row becomes zero.

    Source: Gram–Schmidt with every projection done twice, which leaves an orthogonality error of
    the order of round-off: Giraud, Langou and Rozložník 2005, doi:10.1007/s00211-005-0615-4.
    """
    basis = torch.zeros_like(rows)
    for index, row in enumerate(rows):
        rest = row
        for _ in range(2 if index else 0):
            done = basis[:index]
            rest = torch.addmv(rest, done.T, done @ rest, alpha=-1)
        before, after = torch.linalg.vector_norm(row), torch.linalg.vector_norm(rest)
        alive = (after > DEAD * before).to(rows.dtype)
        basis[index] = rest * (alive / after.clamp_min(torch.finfo(rows.dtype).tiny))
    return basis


def right_singular_rows(rows: Tensor) -> Tensor:
    """Return the right singular vectors (R, P) of ``rows`` (R, P), as rows, in no given order.

    A direction that the rows do not reach becomes zero. The rows are factored as ``L Q``, and the
    eigenvectors of the R×R matrix ``Lᵀ L`` turn Q.
    """
    basis = orthonormal_rows(rows)
    factor = (rows @ basis.T).double()
    factor = factor / factor.abs().amax().clamp_min(TINY)
    _, vectors = eigh(factor.T @ factor)
    return vectors.T.to(rows.dtype) @ basis


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,) and eigenvectors (n, n), as columns, of a symmetric matrix.

    Cyclic Jacobi rotations, n/2 disjoint pairs at a time; the eigenvalues are not sorted.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 8.5, with the
    round-robin ordering of Brent and Luk 1985, doi:10.1137/0906007.
    """
    size = matrix.shape[0]
    padded = torch.nn.functional.pad(matrix, (0, size % 2, 0, size % 2))
    even = padded.shape[0]
    vectors = torch.eye(even, dtype=matrix.dtype, device=matrix.device)
    sweeps = SWEEPS + size // 3
    for _ in range(sweeps * (even - 1)):  # every sweep ends with the players where they began
        padded, vectors = _rotate(padded, vectors)
        padded = _advance(_advance(padded).T).T
        vectors = _advance(vectors.T).T
    return padded.diagonal()[:size], vectors[:size, :size]


def _rotate(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Zero the entries that pair index i with index n - 1 - i."""
    half = matrix.shape[0] // 2
    diagonal = matrix.diagonal()
    gap = diagonal[half:].flip(0) - diagonal[:half]
    entry = matrix[:half, half:].flip(1).diagonal()
    sign = torch.where(gap >= 0, 1.0, -1.0).to(matrix.dtype)
    reach = gap.abs() + (gap.square() + 4 * entry.square()).sqrt()
    tangent = 2 * entry * sign / reach.clamp_min(torch.finfo(matrix.dtype).tiny)
    cosine = (1 + tangent.square()).rsqrt()
    sine = tangent * cosine
    turned = _turn(_turn(matrix, cosine, sine).T, cosine, sine).T
    return turned, _turn(vectors.T, cosine, sine).T


def _turn(rows: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = rows.shape[0] // 2
    top, bottom = rows[:half], rows[half:].flip(0)
    new_top = cosine[:, None] * top - sine[:, None] * bottom
    new_bottom = sine[:, None] * top + cosine[:, None] * bottom
    return torch.cat([new_top, new_bottom.flip(0)])


def _advance(rows: Tensor) -> Tensor:
    """Move every player but the first by one place, so that the next pairs meet."""
    return torch.cat([rows[:1], rows[-1:], rows[1:-1]])
