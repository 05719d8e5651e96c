"""Recoverable Compression's algorithm, against scikit-learn and a slow reference written from the equations."""

import pytest
import torch

from foveate.modeling.methods.recoverable_algorithm import (
    assign_tokens,
    class_token_scores,
    local_outlier_factor,
    text_similarity,
)

from . import reference_recoverable as reference


VARIANTS = ("official", "paper")
FLAGS = [(text, secondary) for text in (True, False) for secondary in (True, False)]


def make_inputs(batch=3, num_patches=144, width=16, seed=0, spread=2.5, dtype=torch.float32):
    """Scores with a heavy upper tail (softmax), heavy-tailed similarities, keys in a few loose groups."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    scores = (spread * normal(batch, num_patches)).softmax(dim=-1)
    similarity = 0.002 * normal(batch, num_patches) / normal(batch, num_patches).abs().clamp(min=0.2)
    groups = torch.randint(0, 6, (batch, num_patches), generator=generator)
    keys = normal(batch, 6, width).gather(1, groups[..., None].expand(-1, -1, width))
    keys = keys + normal(batch, num_patches, width)
    return scores.to(dtype), similarity.to(dtype), keys.to(dtype)


def make_features(batch, num_patches, width=16, dtype=torch.float32):
    return torch.randn(batch, num_patches, width, generator=torch.Generator().manual_seed(99)).to(dtype)


def reference_provenance(scores, similarity, keys, **options):
    images = zip(scores.double().numpy(), similarity.double().numpy(), keys.double().numpy(), strict=True)
    return [reference.compress_image(*image, **options) for image in images]


def assert_same_provenance(actual, expected, atol=1e-6):
    assert len(actual) == len(expected)
    for (weights, roles), (expected_weights, expected_roles) in zip(actual, expected, strict=True):
        assert roles.tolist() == torch.as_tensor(expected_roles).tolist()
        torch.testing.assert_close(weights.double(), torch.as_tensor(expected_weights).double(), atol=atol, rtol=1e-4)


# Local Outlier Factor


def samples(kind, batch, num_values, seed=0):
    """In double: on float32's grid two neighbours may be equally far on both sides, and then either is right."""
    generator = torch.Generator().manual_seed(seed)
    normal, other = torch.randn(2, batch, num_values, generator=generator, dtype=torch.float64)
    return {
        "uniform": other.sigmoid(),
        "normal": normal,
        "heavy-tailed": normal / other,
        "softmax": (2 * normal).softmax(dim=-1),
        "two clusters": torch.where(normal > 0.5, 100 + 0.01 * normal, normal),
    }[kind]


@pytest.mark.parametrize("num_neighbors", [1, 10, 20, 90])
@pytest.mark.parametrize("kind", ["uniform", "normal", "heavy-tailed", "softmax", "two clusters"])
def test_local_outlier_factor_is_scikit_learns(kind, num_neighbors):
    values = samples(kind, 3, 144)
    factors = local_outlier_factor(values, num_neighbors)
    for row, factor in zip(values, factors, strict=True):
        expected = reference.outlier_factors(row.tolist(), num_neighbors)
        torch.testing.assert_close(factor, torch.as_tensor(expected), rtol=1e-7, atol=0)


@pytest.mark.parametrize("num_neighbors", [3, 20])
def test_masked_local_outlier_factor_is_that_of_the_sample_alone(num_neighbors):
    values = samples("heavy-tailed", 9, 60, seed=1)
    counts = torch.tensor([60, 59, 40, 21, 20, 5, 3, 2, 1])
    mask = torch.rand(9, 60, generator=torch.Generator().manual_seed(2)).argsort(dim=-1) < counts[:, None]
    factors = local_outlier_factor(values, num_neighbors, mask)
    for row, factor, chosen in zip(values, factors, mask, strict=True):
        expected = reference.outlier_factors(row[chosen].tolist(), num_neighbors)
        torch.testing.assert_close(factor[chosen], torch.as_tensor(expected), rtol=1e-7, atol=0)
        assert (factor[~chosen] == 1).all()


@pytest.mark.parametrize("num_values", [2, 3, 7, 20, 21])
def test_more_neighbors_than_values_uses_all_others(num_values):
    values = samples("normal", 2, num_values)
    for row, factor in zip(values, local_outlier_factor(values, 20), strict=True):
        torch.testing.assert_close(
            factor, torch.as_tensor(reference.outlier_factors(row.tolist(), 20)), rtol=1e-7, atol=0
        )


def test_repeated_values_are_scikit_learns():
    """As far as they are defined: many equal values, no neighbours equally far on both sides."""
    values = samples("heavy-tailed", 4, 80, seed=3)
    values[:, :30] = 0.0  # more equal values than neighbours, in the middle of the others
    values[:, 30:35] = values[:, 35:36]  # and fewer
    for row, factor in zip(values, local_outlier_factor(values, 20), strict=True):
        expected = reference.outlier_factors(row.tolist(), 20)
        torch.testing.assert_close(factor, torch.as_tensor(expected), rtol=1e-6, atol=0)
        assert expected.max() > 1e7


def test_nearest_values_win_over_equal_ones_farther_away():
    """The k-distance alone does not tell the neighbours: 0, 0 and 3.9 all lie within the 2 of the point at 2."""
    values = torch.tensor([[0.0, 0.0, 2.0, 3.9, 4.5, 9.0]])
    expected = reference.outlier_factors(values[0].tolist(), 2)
    torch.testing.assert_close(local_outlier_factor(values, 2)[0], torch.as_tensor(expected))


def test_of_two_neighbors_equally_far_the_smaller_is_taken():
    """The neighbour of 1 is 0, as sparse as itself, and not 2, which has half the distance to 2.5."""
    assert local_outlier_factor(torch.tensor([[0.0, 1.0, 2.0, 2.5]]), 1)[0, 1].item() == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_two_values_or_fewer_have_no_outlier(count):
    mask = (torch.arange(6) < count).expand(2, 6)
    assert (local_outlier_factor(samples("normal", 2, 6), 20, mask) == 1).all()


def test_constant_values_have_no_outlier():
    assert (local_outlier_factor(torch.full((2, 144), 1 / 145), 20) == 1).all()


def test_local_outlier_factor_refuses_no_neighbors():
    with pytest.raises(ValueError, match="num_neighbors"):
        local_outlier_factor(torch.rand(1, 5), 0)


# Scores


def test_scores_are_the_equations():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 64, generator=generator), torch.randn(2, 50, 64, generator=generator)
    scores, similarity = class_token_scores(query, keys), text_similarity(query, keys)
    assert scores.shape == (2, 49) and similarity.shape == (2, 50)
    for i in range(2):
        expected_scores = torch.as_tensor(reference.class_token_scores(query[i].numpy(), keys[i].numpy()))
        expected_similarity = torch.as_tensor(reference.text_similarity(query[i].numpy(), keys[i].numpy()))
        torch.testing.assert_close(scores[i].double(), expected_scores.double(), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(similarity[i].double(), expected_similarity.double(), rtol=1e-5, atol=1e-7)


def test_scores_keep_full_precision_under_autocast():
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 64, generator=generator), torch.randn(2, 50, 64, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, similarity = class_token_scores(query, keys), text_similarity(query, keys)
    assert torch.equal(scores, class_token_scores(query, keys))
    assert torch.equal(similarity, text_similarity(query, keys))


# Assignment


@pytest.mark.parametrize(("text_recovery", "secondary_recovery"), FLAGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_assignment_is_the_references(variant, text_recovery, secondary_recovery):
    flags = {"variant": variant, "text_recovery": text_recovery, "secondary_recovery": secondary_recovery}
    for seed in range(3):
        inputs = make_inputs(seed=seed)
        expected = reference_provenance(*inputs, **flags)
        assert_same_provenance(assign_tokens(*inputs, **flags).provenance(), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_assignment_of_576_patches_is_the_references(variant):
    inputs = make_inputs(batch=2, num_patches=576, seed=3, spread=5.0)
    assignment = assign_tokens(*inputs, variant=variant)
    assert_same_provenance(assignment.provenance(), reference_provenance(*inputs, variant=variant))
    assert len(set(assignment.counts.tolist())) == 2  # of different lengths, or the test would show less than it says
    assert assignment.merge_valid.any(dim=-1).all()


def test_number_of_neighbors_is_the_references():
    inputs = make_inputs(seed=4)
    options = [(5, 3), (30, 20), (90, 10), (20, 90)]
    results = [
        assign_tokens(*inputs, variant="official", lof_neighbors=k, secondary_lof_neighbors=j) for k, j in options
    ]
    for (k, j), result in zip(options, results, strict=True):
        expected = reference_provenance(*inputs, variant="official", k=k, secondary_k=j)
        assert_same_provenance(result.provenance(), expected)
    assert len({tuple(result.counts.tolist()) for result in results}) == len(options)


@pytest.mark.parametrize(("num_patches", "seed"), [(12, 1), (25, 3), (40, 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_than_33_left_over_are_all_absorbed(variant, num_patches, seed):
    """The authors' code stops with an error here."""
    inputs = make_inputs(batch=6, num_patches=num_patches, seed=seed, spread=8.0)
    result = assign_tokens(*inputs, variant=variant, lof_neighbors=3, secondary_lof_neighbors=2)
    assert ((result.role == 0).sum(dim=-1) < 33).all() and result.merge_valid.any()
    assert_same_provenance(result.provenance(), reference_provenance(*inputs, variant=variant, k=3, secondary_k=2))


def test_extra_token_is_left_out_where_nothing_but_centers_is_left():
    inputs = make_inputs(batch=6, num_patches=25, seed=3, spread=8.0)
    result = assign_tokens(*inputs, variant="official", lof_neighbors=3, secondary_lof_neighbors=2)
    num_rest, num_merged = (result.role == 0).sum(dim=-1), result.merge_valid.sum(dim=-1)
    num_centers = (result.merge == 1).any(dim=-1).sum(dim=-1)
    only_centers = num_centers == num_rest
    assert only_centers.any()
    assert torch.equal(num_merged[only_centers], num_rest[only_centers])
    assert (result.counts <= 25).all()


@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_equals_single(variant, budget):
    inputs = make_inputs(batch=5, seed=11)
    features = make_features(5, 144)
    together = assign_tokens(*inputs, variant=variant, num_visual_tokens=budget)
    parts = together.tokens(features).split(together.counts.tolist())
    for i in range(5):
        single = assign_tokens(*(x[i : i + 1] for x in inputs), variant=variant, num_visual_tokens=budget)
        assert_same_provenance([together.provenance()[i]], single.provenance())
        torch.testing.assert_close(parts[i], single.tokens(features[i : i + 1]))
    assert (len(set(together.counts.tolist())) > 1) == (budget is None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_provenance_times_features(variant, dtype):
    inputs = make_inputs(seed=5)
    features = make_features(3, 144, dtype=dtype)
    assignment = assign_tokens(*inputs, variant=variant)
    tokens, provenance = assignment.tokens(features), assignment.provenance()
    assert tokens.dtype == dtype and tokens.shape == (int(assignment.counts.sum()), 16)
    assert [len(roles) for _, roles in provenance] == assignment.counts.tolist()
    expected = torch.cat([weights.to(dtype) @ x for (weights, _), x in zip(provenance, features, strict=True)])
    torch.testing.assert_close(tokens, expected)
    assert all((weights >= 0).all() for weights, _ in provenance)


def test_kept_tokens_are_the_patches_themselves_in_order_before_the_merged():
    inputs = make_inputs(seed=6)
    features = make_features(3, 144)
    assignment = assign_tokens(*inputs, variant="official")
    parts = assignment.tokens(features).split(assignment.counts.tolist())
    for part, (_, roles), role, x in zip(parts, assignment.provenance(), assignment.role, features, strict=True):
        assert torch.equal(part[roles != 3], x[role > 0])
        assert (roles == 3).nonzero().tolist() == [[i] for i in range(int((role > 0).sum()), len(roles))]


def test_unused_merge_rows_are_zero_and_last():
    assignment = assign_tokens(*make_inputs(batch=6, seed=8), variant="official")
    counts = assignment.merge_valid.sum(dim=-1)
    assert counts.unique().numel() > 1
    assert torch.equal(assignment.merge_valid, torch.arange(assignment.merge.shape[1]) < counts[:, None])
    assert torch.equal((assignment.merge > 0).any(dim=-1), assignment.merge_valid)


def test_paper_merges_all_that_is_left_once_into_means():
    assignment = assign_tokens(*make_inputs(seed=9), variant="paper")
    per_patch = (assignment.merge > 0).sum(dim=1)
    assert torch.equal(per_patch == 1, assignment.role == 0)
    assert (per_patch <= 1).all()
    torch.testing.assert_close(assignment.merge.sum(dim=-1), assignment.merge_valid.float())


def test_gradient_reaches_the_features_of_every_token_and_nothing_else():
    features = make_features(3, 144).requires_grad_()
    assignment = assign_tokens(*(x.requires_grad_() for x in make_inputs(seed=3)), variant="official")
    assert not assignment.merge.requires_grad
    assignment.tokens(features).sum().backward()
    expected = torch.stack([weights.sum(dim=0) for weights, _ in assignment.provenance()])
    torch.testing.assert_close(features.grad, expected[..., None].expand_as(features))


# Budgets


@pytest.mark.parametrize(("text_recovery", "secondary_recovery"), FLAGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_budget_gives_exactly_that_many_tokens(variant, text_recovery, secondary_recovery):
    inputs = make_inputs(batch=2, num_patches=49, seed=1)
    flags = {"variant": variant, "text_recovery": text_recovery, "secondary_recovery": secondary_recovery}
    features = make_features(2, 49)
    for budget in range(1, 50):
        assignment = assign_tokens(*inputs, num_visual_tokens=budget, **flags)
        assert assignment.counts.tolist() == [budget, budget]
        assert assignment.tokens(features).shape[0] == 2 * budget
        merged = int(0.2 * budget * (1 - budget / 49) + 1e-9) if secondary_recovery else 0
        assert assignment.merge_valid.sum(dim=-1).tolist() == [merged, merged]
        visual = -(-(budget - merged) // 2) if text_recovery else budget - merged
        assert (assignment.role == 1).sum(dim=-1).tolist() == [visual, visual]


@pytest.mark.parametrize(("text_recovery", "secondary_recovery"), FLAGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_budgeted_assignment_is_the_references(variant, text_recovery, secondary_recovery):
    flags = {"variant": variant, "text_recovery": text_recovery, "secondary_recovery": secondary_recovery}
    inputs = make_inputs(batch=2, seed=2)
    for budget in (1, 6, 12, 36, 72, 143):  # no, one, two and more merged tokens
        expected = reference_provenance(*inputs, budget=budget, **flags)
        assert_same_provenance(assign_tokens(*inputs, num_visual_tokens=budget, **flags).provenance(), expected)


@pytest.mark.parametrize("num_patches", [1, 2, 5, 144])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_budget_of_all_tokens_is_the_identity(variant, num_patches):
    features = make_features(3, num_patches)
    for text_recovery, secondary_recovery in FLAGS:
        assignment = assign_tokens(
            *make_inputs(num_patches=num_patches),
            variant=variant,
            text_recovery=text_recovery,
            secondary_recovery=secondary_recovery,
            num_visual_tokens=num_patches,
        )
        assert torch.equal(assignment.tokens(features), features.flatten(0, 1))
        assert all(torch.equal(weights, torch.eye(num_patches)) for weights, _ in assignment.provenance())


# Edges


@pytest.mark.parametrize(("text_recovery", "secondary_recovery"), FLAGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_any_outlier_a_filter_keeps_one_token(variant, text_recovery, secondary_recovery):
    """Constant scores. The patch that is kept by the visual filter has the similarities' minimum, as all others."""
    _, _, keys = make_inputs(batch=2)
    scores, similarity = torch.full((2, 144), 1 / 145), torch.zeros(2, 144)
    assignment = assign_tokens(
        scores, similarity, keys, variant=variant, text_recovery=text_recovery, secondary_recovery=secondary_recovery
    )
    assert (assignment.role == 1).sum(dim=-1).tolist() == [1, 1]
    assert (assignment.role == 2).sum(dim=-1).tolist() == [int(text_recovery)] * 2
    merged = int(secondary_recovery and variant == "paper")  # the official code has no centre, and then no extra token
    assert assignment.merge_valid.sum(dim=-1).tolist() == [merged, merged]


@pytest.mark.parametrize("num_patches", [1, 2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_images_are_the_references(variant, num_patches):
    for seed in range(4):
        inputs = make_inputs(num_patches=num_patches, seed=seed, spread=4.0)
        for text_recovery, secondary_recovery in FLAGS:
            flags = {"variant": variant, "text_recovery": text_recovery, "secondary_recovery": secondary_recovery}
            assignment = assign_tokens(*inputs, **flags)
            assert (assignment.counts >= 1).all() and (assignment.counts <= num_patches).all()
            assert_same_provenance(assignment.provenance(), reference_provenance(*inputs, **flags))


@pytest.mark.parametrize("variant", VARIANTS)
def test_hard_scores_give_no_nan_and_no_more_tokens_than_patches(variant):
    """Scores that underflowed to zero, one patch that has it all, steps on a grid (bf16), zero keys."""
    spiked = torch.zeros(4, 60)
    spiked[:, 7] = 1.0
    spiked[2] = (torch.randn(60, generator=torch.Generator().manual_seed(0)) * 9).softmax(-1).bfloat16().float()
    spiked[3] = torch.arange(60) / 1770
    similarity = spiked.flip(-1) * 0.03
    keys = torch.cat([torch.zeros(2, 60, 8), make_inputs(2, 60, 8)[2]])
    for lof_neighbors in (1, 20):
        for budget in (None, 1, 10, 30, 60):
            assignment = assign_tokens(
                spiked, similarity, keys, variant=variant, lof_neighbors=lof_neighbors, num_visual_tokens=budget
            )
            tokens = assignment.tokens(make_features(4, 60))
            assert tokens.isfinite().all()
            assert (assignment.counts >= 1).all() and (assignment.counts <= 60).all()
            assert (assignment.merge >= 0).all()
            if variant == "paper":
                torch.testing.assert_close(assignment.merge.sum(dim=-1), assignment.merge_valid.float())


@pytest.mark.parametrize("budget", [None, 36])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_follows_fp32(variant, budget):
    """Same scores, similarities and keys in either precision: same choice; tokens as close as bf16 features are."""
    inputs = make_inputs(seed=10, dtype=torch.bfloat16)
    features = make_features(3, 144, dtype=torch.bfloat16)
    low = assign_tokens(*inputs, variant=variant, num_visual_tokens=budget)
    full = assign_tokens(*(x.float() for x in inputs), variant=variant, num_visual_tokens=budget)
    assert_same_provenance(low.provenance(), full.provenance())
    tokens = low.tokens(features)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), full.tokens(features.float()), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_host_waits_for_one_number_at_most(variant):
    class Waits(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    for budget in (None, 36):
        with Waits() as waits:
            assignment = assign_tokens(*make_inputs(seed=2), variant=variant, num_visual_tokens=budget)
        assert assignment.merge_valid.any()
        assert waits.count == (budget is None)


def test_bad_input_is_told_what_to_do():
    inputs = make_inputs(num_patches=9)
    with pytest.raises(ValueError, match="'official', 'paper'"):
        assign_tokens(*inputs, variant="fast")
    for budget in (0, 10, -1):
        with pytest.raises(ValueError, match=r"`num_visual_tokens` is .* 9 patches"):
            assign_tokens(*inputs, variant="paper", num_visual_tokens=budget)
