"""QG-VTC written slowly, straight from the method's equations, one image at a time, over the whole attention matrix."""

import torch


def encode(tower_layers, embeddings, layers, counts, text_class=None, recycle=True):
    """Tokens of one image after the last of `tower_layers`, and the patches that they were.

    Args:
        tower_layers: the CLIP layers that run.
        embeddings: (1 + N, d), input of the first.
        layers, counts: compressing layers, and the patches left after each.
        text_class: (d,), or `None` for guidance by the image's class token.
    """
    hidden, positions = embeddings, list(range(len(embeddings) - 1))
    for index, layer in enumerate(tower_layers):
        attention, normed = layer.self_attn, layer.layer_norm1(hidden)
        heads, width = attention.num_heads, hidden.shape[1]
        q, k, v = (project(normed) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
        matrices = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            matrices.append(torch.softmax(q[:, part] @ k[:, part].T / (width // heads) ** 0.5, dim=-1))
        mixed = torch.cat([m @ v[:, h * width // heads : (h + 1) * width // heads] for h, m in enumerate(matrices)], 1)
        derived = hidden + attention.out_proj(mixed)  # Z' of step 3a
        if index in layers:
            matrix = torch.stack(matrices).mean(0)
            if text_class is None:
                correlation = matrix[0, 1:]
            else:
                correlation = torch.softmax(attention.q_proj(text_class) @ k[1:].T / width**0.5, dim=-1)  # Eq. 4
            number = counts[layers.index(index)]
            kept = sorted(sorted(range(len(positions)), key=lambda i: -float(correlation[i]))[:number])
            discarded = [i for i in range(len(positions)) if i not in kept]
            tokens = []
            for row in [0] + [i + 1 for i in kept]:
                token = derived[row].clone()
                if recycle:
                    for j in discarded:
                        token += matrix[row, j + 1] * derived[j + 1]  # Eq. 5
                tokens.append(token)
            derived, positions = torch.stack(tokens), [positions[i] for i in kept]
        hidden = derived + layer.mlp(layer.layer_norm2(derived))
    return hidden[1:], positions
