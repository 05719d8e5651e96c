"""MetaCompress written slowly, straight from the method's equations, one image and one number at a time, in double."""

import math

import torch


def positions(length, width):
    """E_pos: entry 2i of a row is the sine of index / 10000^(2i / d), entry 2i + 1 its cosine."""
    found = torch.empty(length, width, dtype=torch.float64)
    for index in range(length):
        for column in range(width):
            angle = index / 10000 ** (2 * (column // 2) / width)
            found[index, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return found


def pool(sequence, num_tokens):
    """Output i: the mean of the up to 3 tokens from ⌊i·n/m⌋ on."""
    length = len(sequence)
    rows = []
    for output in range(num_tokens):
        start = math.floor(output * length / num_tokens)
        window = [sequence[index] for index in range(start, start + 3) if index < length]
        rows.append(sum(window) / len(window))
    return torch.stack(rows)


def compress(sequence, num_tokens, w_q, w_k, omega):
    """X̃ (m, d) and P (m, n) of X (n, d)."""
    sequence, w_q, w_k, omega = (tensor.detach().double() for tensor in (sequence, w_q, w_k, omega))
    positioned = sequence + positions(*sequence.shape)
    queries = [row @ w_q for row in pool(positioned, num_tokens)]  # Eq. 6
    keys = [row @ w_k for row in positioned]  # Eq. 7
    matrix = torch.empty(num_tokens, len(sequence), dtype=torch.float64)
    for i, query in enumerate(queries):  # Eq. 8
        scores = [float((query * omega * key).sum()) / math.sqrt(len(omega)) for key in keys]
        total = sum(math.exp(score - max(scores)) for score in scores)
        for j, score in enumerate(scores):
            matrix[i, j] = math.exp(score - max(scores)) / total
    tokens = [sum(matrix[i, j] * sequence[j] for j in range(len(sequence))) for i in range(num_tokens)]
    return torch.stack(tokens), matrix
