"""Recoverable Compression, slowly: one image at a time, numpy loops and scikit-learn's Local Outlier Factor.

Written from the equations and the facts about the authors' code, not from the fast `compressor_recoverable.py`, which
it checks. A token is a pair (role, {patch: weight}); roles as there: 1 visual, 2 text, 3 merged.
"""

import math
import warnings

import numpy as np
from sklearn.neighbors import LocalOutlierFactor


def outlier_factors(values, k):
    """scikit-learn's factors of a list of numbers; fewer than two numbers have no outlier."""
    if len(values) < 2:
        return np.ones(len(values))
    detector = LocalOutlierFactor(n_neighbors=min(k, len(values) - 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate values")  # what they lead to is what is wanted
        detector.fit(np.asarray(values, dtype=np.float64)[:, None])
    return -detector.negative_outlier_factor_


def count_outliers(values, k, variant):
    threshold = {"official": 1.5, "paper": 1.0}[variant]
    return int(np.sum(outlier_factors(values, k) > threshold))


def best(patches, score, count):
    """The `count` patches of highest score, best first."""
    return sorted(patches, key=lambda patch: -score[patch])[:count]


def cosine(a, b):
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def class_token_scores(cls_query, keys):
    """Softmax of q·K/√C over CLS and patches, without CLS."""
    logits = np.array([np.dot(cls_query, key) / math.sqrt(len(key)) for key in keys])
    exponentials = np.exp(logits - logits.max())
    return (exponentials / exponentials.sum())[1:]


def text_similarity(text, patches):
    return np.array([cosine(text, patch) / math.sqrt(len(text)) for patch in patches])


def budget_shares(budget, n, text_recovery, secondary_recovery):
    """(visual, text, merged) tokens out of a budget."""
    merged = budget * (n - budget) // (5 * n) if secondary_recovery else 0  # ⌊0.2 M (1 - M/N)⌋ without rounding errors
    kept = budget - merged
    visual = math.ceil(kept / 2) if text_recovery else kept
    return visual, kept - visual, merged


def official_merged(s_v, similarity, keys, rest, centers, with_extra):
    tokens = []
    for center in centers:
        closeness = {}
        for other in rest:
            if other != center:
                # the key of patch number "place within the rest" stands in for the patch's own
                closeness[other] = cosine(keys[rest.index(center)], keys[rest.index(other)]) + 50 * similarity[other]
        weights = {other: s_v[other] for other in best(closeness, closeness, 32)}
        weights[center] = 1.0
        tokens.append((3, weights))
    if with_extra:
        tokens.append((3, {patch: s_v[patch] for patch in rest if patch not in centers}))
    return tokens


def paper_merged(s_v, keys, rest, centers):
    clusters = {center: [center] for center in centers}
    for patch in rest:
        if patch not in centers:
            likeness = [cosine(keys[patch], keys[center]) for center in centers]
            clusters[centers[int(np.argmax(likeness))]].append(patch)
    tokens = []
    for members in clusters.values():
        total = sum(s_v[patch] for patch in members)
        tokens.append((3, {patch: s_v[patch] / total for patch in members}))
    return tokens


def compress_image(
    s_v, similarity, keys, variant, k=20, secondary_k=10, text_recovery=True, secondary_recovery=True, budget=None
):
    """Tokens of one image: s_v (N,), similarity (N,), keys (N, C) → (weights (m, N), roles (m,))."""
    n = len(s_v)
    everything = list(range(n))
    num_visual, num_text, num_merged = (
        (None, None, None) if budget is None else budget_shares(budget, n, text_recovery, secondary_recovery)
    )

    # 1. visual filter
    if num_visual is None:
        r = count_outliers(s_v, k, variant) / n
        num_visual = max(1, math.floor(n * r))
    visual = best(everything, s_v, num_visual)
    others = [patch for patch in everything if patch not in visual]

    # 2. text recovery
    text = []
    if text_recovery:
        if num_text is None:
            lowered = [min(similarity) if patch in visual else similarity[patch] for patch in everything]
            r = count_outliers(lowered, k, variant) / n
            num_text = max(1, math.floor((n - len(visual)) * r))
        text = best(others, similarity, num_text)
    tokens = [(1 if patch in visual else 2, {patch: 1.0}) for patch in sorted(visual + text)]

    # 3. secondary recovery
    rest = [patch for patch in others if patch not in text]
    if secondary_recovery and rest and num_merged != 0:
        outliers = count_outliers([s_v[patch] for patch in rest], secondary_k, variant)
        if variant == "official":
            if num_merged is None:
                num_centers = min(math.floor(len(tokens) * (outliers / len(rest))), len(rest))
                with_extra = 0 < num_centers < len(rest)
            else:
                num_centers, with_extra = num_merged - 1, True
            tokens += official_merged(s_v, similarity, keys, rest, best(rest, s_v, num_centers), with_extra)
        else:
            num_centers = max(1, outliers) if num_merged is None else num_merged
            tokens += paper_merged(s_v, keys, rest, best(rest, s_v, num_centers))

    # 4. merger
    weights = np.zeros((len(tokens), n))
    for row, (_, sources) in enumerate(tokens):
        for patch, weight in sources.items():
            weights[row, patch] = weight
    return weights, np.array([role for role, _ in tokens])
