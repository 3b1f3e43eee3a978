"""Programs of several passes, axes and outputs: right at every size in fp32, and how many sweeps and kernels they take.

A program says the fewest it could take, and why not fewer. `OTHERS` holds what planning takes where that differs.
"""

from __future__ import annotations

import pytest
import torch
from zoo import programs
from zoo_checks import built, check_at, kernels_of, rewritten

FUSED = [p for p in programs(part=2) if p.fused and not p.rows]
OTHERS = {
    # A short group's maximum is not kept in the tile: groups are reduced in a sweep before.
    "hierarchical_groups": (2, 1),
    "hierarchical_strided": (2, 1),
    "hierarchical_strided_split": (2, 1),
    "hierarchical_then_all_views": (3, 1),
    "hierarchical_documents_scores": (2, 1),
    # Centred moments: an action on (mass, mean, moment) would do; what is not finished is waited for.
    "moment_centred": (2, 1),
    "moment_centred_einsum": (2, 1),
    "moment_centred_scalar": (2, 1),
    "moment_centred_scalar_unnormalised": (2, 1),
    "moment_soft_argmax_matmul": (2, 1),
    # At the widths of this test, with all points in a tile, values of pairs cost less there than in a kernel apart.
    "ipa_einsum": (1, 1),
    # p log p is NaN where p underflows, and entr is 0 there: both want finished weights.
    "entropy_entr": (2, 1),
    "entropy_only": (2, 1),
    # A maximum times a learned temperature is no maximum: the sign is not known.
    "mixture_temperatures_by_hand": (2, 1),
    # A count of positions is a sweep of its own.
    "temperature_log_length_counted": (2, 1),
    # The label's logit is a contraction per row, swept over features by the kernel of the rows; a mean over all rows is
    # one more kernel.
    "lm_loss_cross_entropy": (4, 2),
    "lm_loss_gather": (2, 1),
    "lm_loss_logsumexp": (2, 1),
    "lm_loss_long_contraction": (4, 2),
    "lm_loss_long_contraction_bias": (5, 3),
    "label_log_probability": (2, 1),
    "label_log_probability_nll": (2, 1),
    "token_losses": (2, 1),
    "distillation": (2, 1),
    "smoothed_loss": (5, 3),
    "smoothed_loss_by_hand": (2, 1),
    "clip_loss": (4, 2),
    "nt_xent": (4, 2),
    "sigmoid_loss": (2, 2),
    "mutual_best": (3, 2),
    "mutual_best_by_hand": (3, 2),
    # Both directions are sweeps over the same rows' number.
    "clip_loss_logsumexp": (1, 1),
    # Softmaxes of several heads, or of two, are kernels before the one that mixes them.
    "differential_einsum": (2, 2),
    "talking_cait": (2, 2),
    "talking_einsum_causal": (2, 2),
    "talking_conv_causal": (2, 2),
    "talking_reattention": (2, 2),
    "talking_reattention_by_hand": (2, 2),
    # A number of heads that the program fixes is no axis: all are in one sweep.
    "weights_max_over_heads_unbound": (1, 2),
    "slot_multihead_logsumexp": (3, 2),
    # Rows that are normalised after heads are averaged are summed in a sweep of their own.
    "rollout": (8, 6),
    "two_hops_one_by_one": (3, 3),
    # Each piece of a concatenation is swept for each reduction.
    "lse_blocks_concatenated": (6, 1),
    # What a scan or a sort gives is read as it is: nothing waits for it.
    "stick_breaking_total": (1, 1),
    "contextual_positions_total": (1, 1),
    "sparsemax": (1, 1),
    "sparsemax_masked": (1, 1),
    # Three outputs of one softmax share a sweep, values per pair of rows too, where few features fit into registers.
    "ipa_openfold": (1, 1),
}


@pytest.mark.parametrize("program", FUSED, ids=lambda program: program.name)
def test_right_in_as_few_sweeps_and_kernels_as_it_says(program):
    model = built(program, torch.float32)
    result = rewritten(program, model, torch.float32)
    assert result.report["chains"], result.report["unfused"]
    for sizes in (program.traced, *program.others[:1]):
        check_at(program, model, result, sizes, torch.float32)
    sweeps = sum(chain["passes"] for chain in result.report["chains"])
    assert (sweeps, kernels_of(result.sources)) == OTHERS.get(program.name, (program.passes, program.kernels))
