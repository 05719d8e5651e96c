"""Recoverable Compression: which visual tokens are kept, recovered by the question, or merged. Tensors in, tensors out.

Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information" (AAAI
2025), https://arxiv.org/abs/2409.01179; training-free. The four steps of its "Overview", and where they are here:

1. visual filter (Eq. 1): `class_token_scores`, and the top-scored patches, as many as the dynamic scale filter says;
2. text information recovery (Eq. 2): `text_similarity`, and the most similar of the other patches, likewise;
3. secondary recovery: the rest is clustered around its top-scored patches, and each cluster becomes one token;
4. token merger: kept patches in their original order, then the merged ones: `TokenAssignment.tokens`.

The dynamic scale filter (Eq. 3-5) counts outliers among the scores by their `local_outlier_factor`.
`variant="official"` is what the authors' published code computes, `"paper"` what their text says.

Letters in shapes: B images, N patches, C vision width, D width of the CLIP projection, G merged tokens, k neighbours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


OUTLIER_THRESHOLD = {"official": 1.5, "paper": 1.0}  # the code: scikit-learn's contamination="auto"; the paper: Eq. 5
DROPPED, VISUAL, TEXT, MERGED = 0, 1, 2, 3  # roles; MERGED only in `TokenAssignment.provenance`

# The authors' code; the paper names no number.
_CLUSTER_NEIGHBORS = 32
_CLUSTER_SIMILARITY_WEIGHT = 50.0


@dataclass(frozen=True, eq=False)
class TokenAssignment:
    """What becomes of each patch; applied to features it gives the visual tokens.

    Attributes:
        role: (B, N) int64: 0 dropped or merged, 1 kept by the visual filter, 2 recovered by the text.
        merge: (B, G, N) non-negative weights over the patches, a row a merged token; zero rows at the end are padding.
        merge_valid: (B, G) bool, which rows of `merge` are tokens.
    """

    role: Tensor
    merge: Tensor
    merge_valid: Tensor

    @property
    def counts(self) -> Tensor:
        """(B,) int64: tokens of each image, kept and merged."""
        return self._present.sum(dim=-1)

    @property
    def _present(self) -> Tensor:
        return torch.cat([self.role != DROPPED, self.merge_valid], dim=1)  # (B, N + G)

    def tokens(self, features: Tensor) -> Tensor:
        """Tokens of all images, packed one image after the other: kept in their original order, then merged.

        Args:
            features: (B, N, C) of any floating dtype; the gradient flows through.

        Returns:
            (sum(counts), C) in the dtype of `features`.
        """
        merged = self.merge.to(features.dtype) @ features  # (B, G, C)
        return torch.cat([features, merged], dim=1)[self._present]

    def provenance(self) -> list[tuple[Tensor, Tensor]]:
        """For each image what its m tokens are made of: weights (m, N) over its patches, and roles (m,), 3 = merged."""
        provenance = []
        for role, merge, valid in zip(self.role, self.merge, self.merge_valid, strict=True):
            kept, merged = role.nonzero().squeeze(-1), merge[valid]
            weights = torch.cat([F.one_hot(kept, len(role)).to(merge.dtype), merged])  # (m, N)
            provenance.append((weights, F.pad(role[kept], (0, len(merged)), value=MERGED)))
        return provenance


def class_token_scores(cls_query: Tensor, keys: Tensor) -> Tensor:
    """How much the class token attends to each patch (Eq. 1): all heads as one, softmax over CLS and patches.

    Args:
        cls_query: (B, C), the class token's query in the vision tower's last layer, heads concatenated.
        keys: (B, N + 1, C), that layer's keys, CLS first.

    Returns:
        (B, N) float32, CLS left out (so that a row sums to less than 1).
    """
    logits = _dot(cls_query[:, None], keys)[:, 0] / keys.shape[-1] ** 0.5  # (B, N + 1)
    return logits.softmax(dim=-1)[:, 1:]


def text_similarity(text_embedding: Tensor, patch_embedding: Tensor) -> Tensor:
    """How much each patch has to do with the question: cosine times D^-1/2, the authors' reading of Eq. 2.

    Args:
        text_embedding: (B, D), the question after CLIP's text projection.
        patch_embedding: (B, N, D), the patches' final hidden states after CLIP's visual projection.

    Returns:
        (B, N) float32.
    """
    return _cosine(text_embedding[:, None], patch_embedding)[:, 0] * patch_embedding.shape[-1] ** -0.5


def local_outlier_factor(scores: Tensor, num_neighbors: int, mask: Tensor | None = None) -> Tensor:
    """Local Outlier Factor (Eq. 3-4) of one-dimensional values, each row a sample of its own.

    As scikit-learn has it (`-LocalOutlierFactor(num_neighbors).fit(x).negative_outlier_factor_`): exactly k neighbours,
    the point itself not among them. On a line the point and its k nearest are k + 1 consecutive values of the sorted
    sample, so no distance matrix is needed. Of two neighbours equally far on either side the smaller value is taken
    (scikit-learn takes either).

    Args:
        scores: (B, N).
        num_neighbors: k; a sample of n values uses at most n - 1.
        mask: (B, N) bool, which entries are in the sample; all if None.

    Returns:
        (B, N) float64 (float32 on a device without it); 1, "no outlier", for entries outside the sample or alone in it.
    """
    if num_neighbors < 1:
        raise ValueError(f"`num_neighbors` is {num_neighbors}; the Local Outlier Factor needs at least 1 neighbour.")
    num_values = scores.shape[1]
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    # Softmax scores lie 1e-6 apart and closer: differences and their means in double, as in scikit-learn.
    values, order = scores.to(_most_precise(scores.device)).masked_fill(~mask, torch.inf).sort(dim=-1)  # (B, N)
    count = mask.sum(dim=-1, keepdim=True)  # (B, 1)
    k = (count - 1).clamp(min=0, max=num_neighbors)  # (B, 1)
    place = torch.arange(num_values, device=scores.device)
    step = torch.arange(min(num_neighbors, num_values - 1) + 1, device=scores.device)  # (k + 1,)

    # The window starts k places to the left and moves right while the value it loses is farther than the one it gains.
    leftmost = place - k  # (B, N)
    lost = leftmost[..., None] + step[:-1]  # (B, N, k)
    gained = (lost + k[..., None] + 1).clamp(max=num_values)
    gain_distance = _take(F.pad(values, (0, 1), value=torch.inf), gained) - values[..., None]
    loss_distance = values[..., None] - _take(values, lost.clamp(0, num_values - 1))
    moves = ((lost < 0) | (loss_distance > gain_distance)) & (step[:-1] < k[..., None])
    window = (leftmost + moves.sum(dim=-1))[..., None] + step  # (B, N, k + 1)

    is_neighbor = (step <= k[..., None]) & (window != place[:, None])
    window = window.clamp(max=num_values - 1)
    distance = (values[..., None] - _take(values, window)).abs().masked_fill(~is_neighbor, 0)
    k_distance = distance.amax(dim=-1)  # (B, N)
    reach = torch.maximum(distance, _take(k_distance, window)).masked_fill(~is_neighbor, 0).sum(dim=-1)
    density = 1 / (reach / k.clamp(min=1) + 1e-10)  # (B, N); Eq. 3, with scikit-learn's guard for duplicates
    ratio = (_take(density, window) / density[..., None]).masked_fill(~is_neighbor, 0)
    factor = ratio.sum(dim=-1) / k.clamp(min=1)  # (B, N); Eq. 4
    factor = torch.where((place < count) & (k > 0), factor, 1)
    return torch.empty_like(factor).scatter_(1, order, factor)


@torch.no_grad()
def assign_tokens(
    visual_scores: Tensor,
    similarity: Tensor,
    keys: Tensor,
    *,
    variant: str,
    lof_neighbors: int = 20,
    secondary_lof_neighbors: int = 10,
    text_recovery: bool = True,
    secondary_recovery: bool = True,
    num_visual_tokens: int | None = None,
) -> TokenAssignment:
    """Decide what becomes of each patch; an image in a batch gets what it gets alone.

    Without a budget the number of tokens is the image's and the question's own: steps 1 and 2 keep ⌊candidates · share
    of outliers⌋ patches each, and at least one (the authors' code may keep none). Of equal scores the first patch is
    taken (`torch.topk`, which the authors use, leaves that open).

    With a budget of M tokens no outliers are counted: c = ⌊0.2 · M · (1 - M / N)⌋ tokens are merged; of the M - c kept
    ones the visual filter takes half, rounded up, and the text the others. The official variant's extra token is one of
    the c, beside c - 1 clusters. M = N keeps every patch.

    Args:
        visual_scores: (B, N), from `class_token_scores`.
        similarity: (B, N), from `text_similarity`.
        keys: (B, N, C), the patches' keys, CLS left out.
        variant: "official" or "paper".
        lof_neighbors: k of steps 1 and 2.
        secondary_lof_neighbors: k of step 3.
        text_recovery: recover patches by the text (step 2); if not, the visual filter alone keeps patches.
        secondary_recovery: merge the rest (step 3); if not, it is dropped.
        num_visual_tokens: M, tokens of every image; None lets the filters decide.

    Raises:
        ValueError: unknown variant, or a budget that is not in 1..N.
    """
    num_patches = visual_scores.shape[1]
    if variant not in OUTLIER_THRESHOLD:
        raise ValueError(f"`variant` is {variant!r}; choose one of {', '.join(map(repr, OUTLIER_THRESHOLD))}.")
    if num_visual_tokens is not None and not 1 <= num_visual_tokens <= num_patches:
        raise ValueError(
            f"`num_visual_tokens` is {num_visual_tokens}, but the image has {num_patches} patches; choose from 1 to "
            f"{num_patches}, or None to let the filters decide."
        )
    scores, similarity, threshold = visual_scores.float(), similarity.float(), OUTLIER_THRESHOLD[variant]
    num_visual: Tensor | int | None = None
    num_text: Tensor | int | None = None
    num_merged: int | None = None
    if num_visual_tokens is not None:
        num_merged = num_visual_tokens * (num_patches - num_visual_tokens) // (5 * num_patches)
        num_merged = num_merged if secondary_recovery else 0
        num_text = (num_visual_tokens - num_merged) // 2 if text_recovery else 0
        num_visual = num_visual_tokens - num_merged - num_text

    # Step 1. How many comes from the outliers, of both tails; which ones from the score.
    if num_visual is None:
        num_visual = _outlier_share(scores, lof_neighbors, threshold, num_patches)[0].clamp(min=1)  # (B,)
    visual = _is_top(scores, num_visual)  # (B, N)

    # Step 2. Outliers are counted over all N, with the kept ones at the row's minimum; only the others can be chosen.
    text = torch.zeros_like(visual)
    if text_recovery:
        if num_text is None:
            lowered = torch.where(visual, similarity.amin(dim=-1, keepdim=True), similarity)
            num_text = _outlier_share(lowered, lof_neighbors, threshold, num_patches - num_visual)[0].clamp(min=1)
        text = _is_top(similarity, num_text, ~visual) & ~visual  # (B, N); none to recover where all are kept

    # Step 3.
    merge, merge_valid = scores.new_zeros(len(scores), 0, num_patches), visual[:, :0]
    if secondary_recovery and num_merged != 0:
        rest = ~(visual | text)
        num_centers, has_extra = _count_centers(scores, rest, variant, secondary_lof_neighbors, num_merged)
        num_rows = num_merged or int((num_centers + has_extra).max())  # the one number that the host waits for
        if num_rows > 0:
            centers = _ranking(scores, rest)[:, :num_rows]  # (B, G) patches; clusters by descending score
            row = torch.arange(num_rows, device=scores.device)
            merge_valid, is_cluster = row < (num_centers + has_extra)[:, None], row < num_centers[:, None]  # (B, G)
            if variant == "official":
                clusters = _nearest_added(scores, similarity, keys, rest, centers) * is_cluster[..., None]
                extra = scores * (rest & ~_is_top(scores, num_centers, rest))  # (B, N): the non-centres by their scores
                merge = torch.where((merge_valid & ~is_cluster)[..., None], extra[:, None], clusters)
            else:
                merge = _cluster_means(scores, keys, rest, centers, is_cluster)
    return TokenAssignment(visual * VISUAL + text * TEXT, merge, merge_valid)


def _count_centers(
    scores: Tensor, rest: Tensor, variant: str, num_neighbors: int, num_merged: int | None
) -> tuple[Tensor, Tensor]:
    """Number of clusters (B,), and whether there is the official variant's extra token (B,), the sum of non-centres."""
    num_rest = rest.sum(dim=-1)
    if num_merged is not None:
        has_extra = torch.full_like(rest[:, 0], variant == "official")
        return num_merged - has_extra.long(), has_extra
    # The authors scale the share of outliers by the number of kept patches, not by the number of those left over.
    num_kept = rest.shape[1] - num_rest
    share, outliers = _outlier_share(scores, num_neighbors, OUTLIER_THRESHOLD[variant], num_kept, rest)
    if variant == "official":
        num_centers = share.minimum(num_rest)
        return num_centers, (num_centers > 0) & (num_centers < num_rest)
    return outliers.clamp(min=1).minimum(num_rest), torch.zeros_like(rest[:, 0])


def _nearest_added(scores: Tensor, similarity: Tensor, keys: Tensor, rest: Tensor, centers: Tensor) -> Tensor:
    """Official clusters (B, G, N): a centre plus its 32 nearest of all the rest, centres too, each times its score."""
    # The authors gather keys from the full list by the index *within the rest*: the i-th patch left over is compared
    # by the key of the i-th patch of the image. A slip, but parity needs it.
    slipped = (rest.cumsum(dim=-1) - 1).clamp(min=0)  # (B, N)
    cosine = _cosine(_take_rows(keys, slipped.gather(1, centers)), keys)  # (B, G, N), by slipped index
    closeness = cosine.gather(2, slipped[:, None].expand_as(cosine)) + _CLUSTER_SIMILARITY_WEIGHT * similarity[:, None]
    absorbable = rest[:, None].expand_as(cosine).scatter(2, centers[..., None], False)  # all but the centre itself
    closeness = closeness.masked_fill(~absorbable, -torch.inf)
    nearest = closeness.topk(min(_CLUSTER_NEIGHBORS, closeness.shape[-1]), dim=-1).indices
    absorbed = torch.zeros_like(absorbable).scatter_(2, nearest, True) & absorbable
    return (absorbed * scores[:, None]).scatter_(2, centers[..., None], 1.0)


def _cluster_means(scores: Tensor, keys: Tensor, rest: Tensor, centers: Tensor, is_cluster: Tensor) -> Tensor:
    """Paper clusters (B, G, N): each patch of the rest joins its most similar centre; means weighted by the scores."""
    affinity = _cosine(_take_rows(keys, centers), keys)  # (B, G, N)
    affinity = affinity.scatter(2, centers[..., None], torch.inf)  # a centre is in its own cluster
    affinity = affinity.masked_fill(~is_cluster[..., None], -torch.inf)
    row = torch.arange(centers.shape[1], device=keys.device)[:, None]  # (G, 1)
    member = (affinity.argmax(dim=1, keepdim=True) == row) & rest[:, None] & is_cluster[..., None]  # (B, G, N)
    tiny = torch.finfo(scores.dtype).tiny  # scores that underflowed to zero still have a mean
    weights = member * scores.clamp(min=tiny)[:, None]
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=tiny)


def _outlier_share(
    scores: Tensor, num_neighbors: int, threshold: float, total: Tensor | int, sample: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """⌊total · r⌋ (B,), where r is the share of outliers in the sample, and the number of outliers (B,)."""
    outliers = (local_outlier_factor(scores, num_neighbors, sample) > threshold).sum(dim=-1)
    size = scores.shape[1] if sample is None else sample.sum(dim=-1).clamp(min=1)
    # In double, as the authors' `int(total * ratio)`, so that a product which falls just short of a whole number is cut
    # off alike (the plain N · r of 144, 256 or 576 patches never does).
    ratio = outliers.to(_most_precise(scores.device)) / size
    return (total * ratio).floor().long(), outliers


def _ranking(scores: Tensor, candidates: Tensor) -> Tensor:
    """(B, N) patches, best candidate first; others last."""
    return scores.masked_fill(~candidates, -torch.inf).sort(dim=-1, descending=True, stable=True).indices


def _is_top(scores: Tensor, count: Tensor | int, candidates: Tensor | None = None) -> Tensor:
    """(B, N) bool: the `count` (B,) top-scored candidates of each row."""
    candidates = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates
    place = torch.arange(scores.shape[1], device=scores.device)
    chosen = (place < (count[:, None] if isinstance(count, Tensor) else count)).expand_as(candidates)
    return torch.zeros_like(candidates).scatter_(1, _ranking(scores, candidates), chosen)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """(B, G, C) · (B, N, C) → (B, G, N) in float32, under autocast too: what is chosen hangs on small differences."""
    with torch.autocast(left.device.type, enabled=False):
        return left.float() @ right.float().transpose(1, 2)


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    """(B, G, C), (B, N, C) → (B, G, N) float32."""
    return _dot(F.normalize(left.float(), dim=-1), F.normalize(right.float(), dim=-1))


def _take(values: Tensor, index: Tensor) -> Tensor:
    """(B, N) at (B, N, K) → (B, N, K)."""
    return values.gather(1, index.flatten(1)).view_as(index)


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """(B, N, C) at (B, G) → (B, G, C)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _most_precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
